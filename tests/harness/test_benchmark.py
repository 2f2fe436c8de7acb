import json

from benchmarks import harness as benchmark
from experiments import sections_harness


def test_the_benchmark_runs_and_its_section_reads_what_it_wrote(tmp_path, capsys):
    benchmark.main(["--quick", "--out", str(tmp_path)])
    assert "goal 1.05" in capsys.readouterr().out
    record = json.loads((tmp_path / "summary.json").read_text())
    assert [row["way"] for row in record["rows"]] == ["bare", "train", "record"]
    text = "\n".join(sections_harness.overheads(record))
    assert "| record |" in text
    assert "1.05: **not reached**" in text, "a save is long beside two tiny steps"
