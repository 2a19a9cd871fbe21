"""The README's table of flags is the one that the configuration prints."""

import re
from pathlib import Path

import pytest

from launch.cluster.config import ClusterConfig
from launch.node.config import JoinSettings
from launch.rollout.config import JobConfig
from launch.scale import ScaleSettings
from launch.settings import help_markdown

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = "common|storage|transfer|scheduler|engine|launch|tests|benchmarks|scripts|examples|docs"


def test_the_table_of_flags_is_current():
    assert help_markdown(ClusterConfig) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(rf"`((?:{ROOMS})/[\w/.]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_some_page_leads_to_every_page():
    text = "".join(page.read_text() for page in PAGES)
    unnamed = [page.name for page in PAGES if f"{page.name})" not in text and page.parent != ROOT]
    assert unnamed == []


def test_the_flags_of_a_node_are_current():
    assert help_markdown(JoinSettings) in (ROOT / "docs" / "deploy.md").read_text()


def test_the_flags_of_scaling_are_current():
    assert help_markdown(ScaleSettings) in (ROOT / "docs" / "deploy.md").read_text()


def test_the_rollout_flags_are_current():
    table = help_markdown(JobConfig)
    assert table in (ROOT / "docs" / "rollout.md").read_text()
