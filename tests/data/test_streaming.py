"""Files larger than memory: what a process holds at its most, beside the size of the file that it reads."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from chatalign.data.sources import read_source
from chatalign.recipe import DatasetSource

_READ = """
import sys
from pathlib import Path
import pyarrow.parquet
from chatalign.data.files import read_file

def peak():  # getrusage's would be that of the process which started this one, where that was larger
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

before = peak()
for name in sys.argv[1:]:
    part, problems = read_file(Path(name))
    assert (sum(1 for _ in part), problems) == (part.count, [])
    print(part.count, peak() - before)
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read as Linux tells it")
def test_reading_holds_a_part_of_a_file(tmp_path: Path) -> None:
    """Lines, a list, a list in an object, and parquet of one row group, the worst case: each read twice, in a row."""
    rng = random.Random(0)
    rows = [{"text": rng.randbytes(2000).hex()} for _ in range(6000)]  # 24 MB that don't compress
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "data": rows}))
    table = pyarrow.concat_tables([pyarrow.Table.from_pylist(rows)] * 8)
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet", row_group_size=len(table))
    names = ["f.jsonl", "list.json", "object.json", "f.parquet"]
    command = [sys.executable, "-c", _READ, *(str(tmp_path / name) for name in names)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    for name, line in zip(names, shown.stdout.splitlines(), strict=True):
        count, held = map(int, line.split())
        assert count == (len(table) if name == "f.parquet" else len(rows))
        assert held < 0.6 * (tmp_path / name).stat().st_size, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    rows = [{"text": f"document {i}", "meta": {"n": i, "tags": ["a", None][: i % 3]}} for i in range(250)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(folder / "one")
    whole.save_to_disk(folder / "shards", num_shards=3)
    datasets.concatenate_datasets([whole.select(range(7)), whole.select(range(7, 250))]).save_to_disk(folder / "joined")
    whole.select([0, *range(2, 250), 1]).save_to_disk(folder / "moved")
    whole.map(lambda row, i: {"text": "other" if i == 249 else row["text"]}, with_indices=True).save_to_disk(
        folder / "changed"
    )
    return folder


def test_the_hash_of_a_saved_dataset_is_its_contents(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever and in how many files it lies; no row is made for it."""
    with monkeypatch.context() as patched:
        patched.setattr(datasets.Dataset, "__iter__", lambda _: pytest.fail("a row was made"))
        sha256 = {place.name: read_source(DatasetSource(path=str(place))).sha256 for place in saved.iterdir()}
    assert sha256["one"] == sha256["shards"] == sha256["joined"]
    assert len({sha256[name] for name in ("one", "moved", "changed")}) == 3
