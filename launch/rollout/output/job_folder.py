"""``DIR/_job``: what job an output folder belongs to, and the lock on it.

``datasets.load_dataset(DIR)`` looks through folders and takes the files of the commonest
extension, Parquet in a draw: so ``_job`` keeps at most one .json and one .jsonl file, and none
.parquet.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

import msgspec

from launch.rollout.config import Parameters, RolloutConfig
from launch.rollout.input.files import digest, input_files
from launch.rollout.input.prompt_table import PromptTable, build_table
from launch.rollout.output.schema import TAKEN_NAMES
from launch.settings import BadConfig, flag


class Manifest(msgspec.Struct):
    """``manifest`` (JSON): what the samples here were made from."""

    parameters: Parameters
    input_digest: str
    model: str = ""


class JobFolder:
    """An output folder, locked for this process until :meth:`close`."""

    def __init__(self, config: RolloutConfig) -> None:
        """Create the folder or check that its job is the one that is asked for; raises
        :class:`BadConfig`, :class:`~launch.rollout.input.files.BadInput`, ``OSError``."""
        self.path = config.output_folder
        self.job = self.path / "_job"
        self.job.mkdir(parents=True, exist_ok=True)
        self._extend = config.extend
        self._lock = self._take_lock()
        try:
            files = input_files(config.input_path)
            self._manifest = self._open(config, digest(files), files)
            self.table = PromptTable(self._table_path)
        except BaseException:  # whatever it is, nobody else will close this folder
            self.close()
            raise

    def close(self) -> None:
        self._lock.close()

    def made_by(self, model: str) -> None:
        """The endpoint serves ``model``: raise :class:`BadConfig` if earlier samples are
        another's."""
        known = self._manifest.model
        if known and known != model and not self._extend:
            raise BadConfig(
                f"--output {self.path} has samples of model {known}; the endpoint serves {model}. "
                "Give another folder, or --extend to mix them, or --overwrite."
            )
        self._manifest.model = model
        self._write_manifest(self._manifest)

    @property
    def _table_path(self) -> Path:
        return self.job / "rows"

    @property
    def _manifest_path(self) -> Path:
        return self.job / "manifest"

    def _take_lock(self) -> IO[str]:
        lock = (self.job / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise BadConfig(
                f"--output {self.path}: another job is writing there; wait for its end or give "
                "another folder."
            ) from None
        return lock

    def _open(self, config: RolloutConfig, input_digest: str, files: list[Path]) -> Manifest:
        asked = Manifest(config.parameters(), input_digest)
        if not self._manifest_path.exists():
            self._refuse_strangers()
        elif config.overwrite:
            self._clear()
        else:
            earlier = msgspec.json.decode(self._manifest_path.read_bytes(), type=Manifest)
            return self._go_on(earlier, asked, files)
        build_table(files, input_digest, self._table_path, TAKEN_NAMES)
        self._write_manifest(asked)
        return asked

    def _refuse_strangers(self) -> None:
        found = sorted(p.name for p in self.path.iterdir() if p.name != "_job")
        if found:
            raise BadConfig(
                f"--output {self.path} holds {found[0]}, which no rollout job wrote; give an "
                "empty or a new folder."
            )

    def _clear(self) -> None:
        for shard in self.path.glob("part-*.parquet"):
            shard.unlink()
        self._manifest_path.unlink()
        for folder in ("journal", "groups"):
            shutil.rmtree(self.job / folder, ignore_errors=True)

    def _go_on(self, earlier: Manifest, asked: Manifest, files: list[Path]) -> Manifest:
        before, now = map(msgspec.structs.asdict, (earlier.parameters, asked.parameters))
        changes = [
            f"{flag(name)} from {before[name]} to {value}"
            for name, value in now.items()
            if value != before[name]
        ]
        if asked.input_digest != earlier.input_digest:
            changes.append("the rows of --input")
        if not changes:
            return earlier
        if not self._extend:
            raise BadConfig(
                f"--output {self.path} has samples of another job; changed: {'; '.join(changes)}. "
                "Give another folder, or --extend to keep them and add what is missing, or "
                "--overwrite to delete them."
            )
        if asked.parameters.n < earlier.parameters.n:
            raise BadConfig(f"--extend with fewer samples: give --n {earlier.parameters.n}.")
        if asked.input_digest != earlier.input_digest:
            self._extend_table(asked.input_digest, files)
        asked.model = earlier.model
        self._write_manifest(asked)
        return asked

    def _extend_table(self, input_digest: str, files: list[Path]) -> None:
        """New rows may follow those that have samples; those must be as they were."""
        longer = self.job / "rows-new"
        build_table(files, input_digest, longer, TAKEN_NAMES)
        old, new = PromptTable(self._table_path), PromptTable(longer)
        if new.rows < old.rows:
            longer.unlink()
            raise BadConfig(
                f"--extend: --input has {new.rows} rows, the job {old.rows}; only append rows."
            )
        for number, (was, now) in enumerate(zip(old.prompts(), new.prompts(), strict=False)):
            if was != now:
                longer.unlink()
                raise BadConfig(
                    f"--extend: row {number} of --input is not the one that was sampled; "
                    "append new rows at the end."
                )
        os.replace(longer, self._table_path)

    def _write_manifest(self, manifest: Manifest) -> None:
        scratch = self._manifest_path.with_suffix(".part")
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        os.replace(scratch, self._manifest_path)
