"""The doctor says what it finds, and by its exit code whether that will do."""

import pytest

from experiments import doctor


@pytest.fixture
def nothing_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    monkeypatch.setenv("TEXT_DATA_DIR", str(tmp_path / "texts"))


@pytest.mark.usefixtures("nothing_prepared")
def test_a_place_where_metax_works(tmp_path, capsys):
    out = tmp_path / "new" / "runs"
    assert doctor.main(["--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "resumed bit for bit" in printed
    assert f"{out} can be written" in printed
    assert "jaxlib" in printed
    assert str(tmp_path / "sets" / "mnist") in printed
    assert "python -m experiments.prepare_data mnist --raw DIR" in printed
    assert "TEXT_DATA_DIR" in printed
    assert not list(out.iterdir())  # it leaves nothing behind


@pytest.mark.usefixtures("nothing_prepared")
def test_a_folder_that_cannot_be_written_fails(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert doctor.main(["--out", str(tmp_path / "file")]) == 1
    printed = capsys.readouterr().out
    assert "folder     FAILED: FileExistsError" in printed
    assert "CANNOT" in printed


def test_a_run_that_does_not_repeat_fails(tmp_path, monkeypatch, capsys):
    def forgetful(run, loop, data, key, num_steps, **options):
        state, infos = doctor.train(loop, data, key, num_steps, chunk=options["chunk"])
        return state._replace(params=None), infos

    monkeypatch.setattr(doctor, "record_run", forgetful)
    assert not doctor.check("self-test", lambda: doctor.self_test(tmp_path, 8))
    assert "self-test  FAILED" in capsys.readouterr().out


def test_a_prepared_set_is_found_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TEXT_DATA_DIR", str(tmp_path))
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "ptb.train.txt").write_text("a b\n")
    lines = list(doctor.data_sets())
    assert f"mnist: found, {folder}" in lines
    assert f"Penn Treebank: found, {tmp_path / 'ptb.train.txt'}" in lines
    assert any(line.startswith("cifar10: missing. `load('cifar10')`") for line in lines)
