"""The README's table of flags is the one that the configuration prints."""

from pathlib import Path

from launch.config import ClusterConfig
from launch.rollout.config import JobConfig
from launch.settings import help_markdown

ROOT = Path(__file__).parents[1]


def test_the_table_of_flags_is_current():
    assert help_markdown(ClusterConfig) in (ROOT / "README.md").read_text()


def test_every_document_named_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    for name in ("architecture", "sglang", "dependencies", "limits", "operations"):
        assert f"docs/{name}.md" in text and (ROOT / "docs" / f"{name}.md").exists()


def test_the_rollout_flags_are_current():
    table = help_markdown(JobConfig)
    assert table in (ROOT / "docs" / "rollout.md").read_text()
