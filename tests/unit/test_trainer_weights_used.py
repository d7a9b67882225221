"""What is done with weights: shown, converted, averaged, and begun from."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from orchestrator.worker import MisconfiguredError
from storage.manifest import commit_key
from tests.weights import (
    STRETCHED,
    TINY,
    assert_same,
    loaded,
    model_of,
    retensor,
    run_folder,
    weights_of,
    written,
)
from trainer.config import ModelConfig
from trainer.job import Job, read_job
from trainer.weights.__main__ import main
from trainer.weights.convert import convert
from trainer.weights.run import annealed, pin
from trainer.weights.sources import open_weights

torch.set_num_threads(1)


# The command ----------------------------------------------------------------------------------


def test_the_command_shows_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(tmp_path / "one")

    assert main(["show", str(tmp_path / "one"), "--check"]) == 0
    assert (
        main(["convert", str(tmp_path / "one"), "--out", str(tmp_path / "two"), "--to", "meta"])
        == 0
    )
    capsys.readouterr()
    assert main(["show", str(tmp_path / "two"), "-o", "json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == TINY.parameters
    assert told["types"] == {"float32": 21}
    assert_same(loaded(open_weights(str(tmp_path / "two"))), model)


def test_a_conversion_that_fails_leaves_nothing_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "one")
    retensor(tmp_path / "one/model.safetensors", lambda t: t["lm_head.weight"].fill_(1e30))

    for more in (["--dtype", "float16"], ["--to", "meta", "--parts", "3"]):
        assert main(["convert", str(tmp_path / "one"), "--out", str(tmp_path / "two"), *more]) == 2
        assert "hint: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert main(["convert", str(tmp_path / "one"), "--out", str(tmp_path / "one")]) == 2
    assert "something is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "out", ["one/config.json/b", "nowhere/b", "b" * 254, "b" * 300, "lost", "lost/b"]
)
def test_a_place_where_no_weights_can_be_written_is_refused_with_a_hint(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "one")
    (tmp_path / "lost").symlink_to("nowhere")

    assert main(["convert", str(tmp_path / "one"), "--out", str(tmp_path / out)]) == 2

    assert "hint: " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"one", "lost"}


# A run that begins from them ------------------------------------------------------------------


def job_from(path: Path, config: ModelConfig = TINY) -> Job:
    model = msgspec.to_builtins(msgspec.structs.replace(config, vocab=1280))
    return read_job({"trainer": {"model": model, "initFrom": str(path)}}, 1)


def test_checkpoints_of_a_run_are_marked_with_the_weights_that_it_began_from(
    tmp_path: Path,
) -> None:
    config = msgspec.structs.replace(TINY, vocab=1280)
    for seed in range(2):
        convert(weights_of(model_of(config, seed), config), tmp_path / str(seed), "hf")

    first, again, other = (job_from(tmp_path / name).identity for name in "001")

    assert first == again != other
    assert first.startswith(config.fingerprint)
    assert read_job({"trainer": {"model": msgspec.to_builtins(config)}}, 1).identity == (
        config.fingerprint
    )


def test_a_run_is_not_begun_from_weights_of_another_model(tmp_path: Path) -> None:
    written(tmp_path / "out")

    with pytest.raises(MisconfiguredError) as caught:
        job_from(tmp_path / "out")

    says = "spec.trainer.initFrom: embedding.weight is of shape [512, 32], expected [1280, 32]"
    assert says in str(caught.value)
    assert "spec.trainer.model" in caught.value.hint
    with pytest.raises(MisconfiguredError, match=r"spec.trainer.initFrom: no such folder"):
        job_from(tmp_path / "nowhere")


def test_a_run_goes_on_without_the_checkpoint_that_it_was_pinned_to_once_it_has_its_own(
    tmp_path: Path,
) -> None:
    config = msgspec.structs.replace(TINY, vocab=1280)
    source = run_folder(tmp_path / "source", model_of(config), step=7)
    other = run_folder(tmp_path / "other", model_of(config, 1), step=7)
    pinned = pin(str(source))
    root = pinned.removeprefix(f"{source}@7")
    trainer = {"model": msgspec.to_builtins(config), "initFrom": pinned}

    first = read_job({"trainer": trainer}, 1).identity
    run_folder(source, model_of(config, 1), step=8)
    again = read_job({"trainer": trainer}, 1).identity
    newest = job_from(source).identity
    with pytest.raises(MisconfiguredError, match="root of the checkpoint of step 7 is "):
        job_from(Path(f"{other}@7{root}"))
    shutil.rmtree(source)
    gone = read_job({"trainer": trainer}, 1, resumes=True).identity

    assert first == again == gone != newest
    with pytest.raises(MisconfiguredError):
        read_job({"trainer": trainer}, 1)
    on = {"model": trainer["model"], "continueFrom": pinned}
    assert read_job({"trainer": on}, 1, resumes=True).identity == first


def test_a_newest_checkpoint_that_can_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    for step in (7, 8):
        run_folder(tmp_path / "run", model_of(), step=step, annealSteps=5, steps=10)
    folder = str(tmp_path / "run")
    records = {step: tmp_path / "run/checkpoints" / commit_key(step, 1) for step in (7, 8)}

    records[8].write_bytes(records[8].read_bytes().replace(b'"version":2', b'"version":1'))
    for address in (folder, f"{folder}@8"):
        with pytest.raises(
            MisconfiguredError, match=r"step 8 can not be read: .*version"
        ) as caught:
            open_weights(address)
        assert f"{folder}@7" in caught.value.hint
    with pytest.raises(MisconfiguredError, match="step 8 can not be read"):
        annealed(folder)
    assert open_weights(f"{folder}@7").where == folder

    records[7].write_bytes(b"{")
    with pytest.raises(MisconfiguredError, match=r"step 8 .*; checkpoint of step 7 ") as caught:
        open_weights(folder)
    assert "none that can be read" in caught.value.hint
    for record in records.values():
        record.unlink()
    with pytest.raises(MisconfiguredError, match="no checkpoint") as caught:
        open_weights(folder)
    assert "not committed one yet" in caught.value.hint


# Averages -------------------------------------------------------------------------------------


def test_the_checkpoints_of_an_anneal_are_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [model_of(seed=seed) for seed in range(3)]
    for model, step in zip(models, (8, 9, 10), strict=True):
        run_folder(tmp_path / "run", model, step=step, annealSteps=2, steps=10)

    assert main(["average", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "mean of 2" in capsys.readouterr().out
    one_by_one = [f"{tmp_path / 'run'}@{step}" for step in (9, 10)]
    assert main(["average", *one_by_one, "--out", str(tmp_path / "same"), "--to", "meta"]) == 0

    for out in ("out", "same"):
        read = loaded(open_weights(str(tmp_path / out)))
        for name, weight in read.named_parameters():
            expected = (models[1].get_parameter(name) + models[2].get_parameter(name)) / 2
            torch.testing.assert_close(weight, expected, atol=1e-7, rtol=1e-6)


def test_what_can_not_be_averaged_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "hf")
    written(tmp_path / "other", config=STRETCHED)
    run_folder(tmp_path / "run", model_of())
    run_folder(tmp_path / "early", model_of(), step=7, annealSteps=2, steps=10)

    for sources, says in (
        (["hf"], "no run to find the checkpoints of"),
        (["run"], "spec.trainer.annealSteps is 0"),
        (["early"], "no checkpoint after step 8, at which the anneal begins"),
        (["hf", "other"], "rope_scaling of the weights is"),
    ):
        addresses = [str(tmp_path / source) for source in sources]
        assert main(["average", *addresses, "--out", str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
