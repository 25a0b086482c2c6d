"""Data, model and vocabulary that do not fit together are refused; what a file says of itself needs no flag."""

import json
import shutil
import zlib

import h5py
import numpy as np
import pytest
import torch

import evaluate
import export_to_huggingface
import fill_mask
import pack_pretraining_data_pytorch
import pytorch_packed_data_checker
from checkpoint.folder import read_checkpoint
from common.errors import UserError
from data.shards import find_shards, read_origin
from data.vocabulary import Vocabulary
from tests.support import known_vocabulary, samples
from tests.support.known_vocabulary import CASED_TOKENS, TOKENS
from tests.support.small_run import train

SENTENCE = "The [MASK] is deep."


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with data sets, a run that has left ckpt_1.pt and ckpt_2.pt in `out`, and its export."""
    folder = tmp_path_factory.mktemp("finished")
    known_vocabulary.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(max_steps=2, num_steps_per_checkpoint=1, max_seq_length=None, max_predictions_per_seq=None)
        export_to_huggingface.main(["--checkpoint=out", "--output_dir=exported"])
    return folder


@pytest.fixture
def workspace(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(capsys, *words) -> list[str]:
    capsys.readouterr()
    fill_mask.main([*words, SENTENCE])
    return capsys.readouterr().out.splitlines()


def without_origin(folder) -> None:
    """Make the shards of a folder those of an earlier version, or of another program."""
    for path in folder.glob("*.hdf5"):
        with h5py.File(path, "a") as file:
            for key in [key for key in file.attrs if key.startswith("vocabulary_")] + ["texts"]:
                del file.attrs[key]


def test_shards_and_checkpoints_carry_the_vocabulary(workspace):
    expected = Vocabulary.of(TOKENS, lower_case=True)
    origin = read_origin("data/text_training_0.hdf5")
    assert (origin.vocabulary, origin.vocabulary.tokens) == (expected, TOKENS)
    saved = torch.load("out/ckpt_2.pt", weights_only=True)["vocabulary"]
    assert saved == {"sha256": expected.sha256, "size": len(TOKENS), "lower_case": True, "lines": expected.lines}
    assert read_checkpoint("exported")["vocabulary"] == saved
    line = samples.log_lines(workspace / "out/log.json")[0]["data"]
    assert (line["max_seq_length"], line["max_predictions_per_seq"]) == (samples.SEQUENCE_LENGTH, samples.PREDICTIONS)


def test_a_checkpoint_and_an_exported_folder_need_no_flag(workspace, capsys):
    typed = answers(capsys, "--checkpoint=out/ckpt_2.pt", "--config_file=config.json", "--vocab_file=vocab.txt",
                    "--do_lower_case=1")
    assert len(typed) == 3, "the sentence, the model's words, and the most frequent ones"
    assert answers(capsys, "--checkpoint=out") == typed
    assert answers(capsys, "--checkpoint=exported") == typed[:2]
    (workspace / "exported/vocab.txt").unlink()  # as transformers 5 leaves it
    assert answers(capsys, "--checkpoint=exported") == typed[:2]
    figures = []
    for checkpoint in ("out", "exported"):
        assert evaluate.main([f"--checkpoint={checkpoint}", "--eval_dir=held_out", "--no_cuda"]) == 0
        figures.append(capsys.readouterr().out.replace(",", " ").split()[:3])
    assert figures[0] == figures[1] and figures[0][:2] == ["MLM", "loss"]


def test_a_folder_stands_for_its_newest_complete_checkpoint(workspace, capsys):
    older = answers(capsys, "--checkpoint=out/ckpt_1.pt")
    path = workspace / "out/ckpt_2.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert answers(capsys, "--checkpoint=out") == older
    path.rename(workspace / "out/ckpt_1.pt")
    with pytest.raises(UserError, match="^--checkpoint out: none of its 1 checkpoints can be read$"):
        fill_mask.main(["--checkpoint=out", SENTENCE])


def test_a_run_goes_on_without_the_flags_that_its_start_knows(workspace):
    known = {"config_file": None, "max_seq_length": None, "max_predictions_per_seq": None}
    train(**known, resume_from_checkpoint=True, max_steps=3)
    train(**known, init_checkpoint="exported", output_dir="new", json_summary="new/log.json", max_steps=1)
    for path in ("out/ckpt_3.pt", "new/ckpt_1.pt"):
        contents = torch.load(path, weights_only=True)
        assert contents["config"]["vocab_size"] == len(TOKENS) and contents["vocabulary"]["lines"]
    with pytest.raises(UserError, match="--config_file is not given, and there is no checkpoint"):
        train(**known, output_dir="fresh", json_summary="fresh/log.json")


OTHER = r"74 tokens, lower-cased \(sha256 \w+…\)"
AS_TRAINED = rf"its vocabulary has {OTHER}, but that of {{}}.* {OTHER}"


@pytest.mark.parametrize("changes, said", [
    ({"input_dir": "other"}, "--input_dir other: " + AS_TRAINED.format("out/ckpt_2.pt")),
    ({"input_dir": "other", "phase2": True, "phase1_end_step": 2}, AS_TRAINED.format("out/ckpt_2.pt")),
    ({"input_dir": "other", "init_checkpoint": "exported", "output_dir": "new"}, AS_TRAINED.format("exported")),
    ({"input_dir": "other", "init_checkpoint": "out/ckpt_1.pt", "output_dir": "new"}, AS_TRAINED.format("out/ckpt_1")),
    ({"eval_dir": "other_held_out"}, "--eval_dir other_held_out: " + AS_TRAINED.format("--input_dir data")),
    ({"eval_dir": "cased_held_out"}, "--eval_dir cased_held_out: its vocabulary has 74 tokens, cased .*, lower-cased"),
    ({"config_file": "large.json", "output_dir": "new"},
     "data/text_training_0.hdf5, its vocabulary: 74 tokens, but vocab_size in the config is 30522"),
    ({"config_file": "small.json", "output_dir": "new"}, "74 tokens, but vocab_size in the config is 73"),
    ({"config_file": "large.json"}, "out/ckpt_2.pt: vocab_size is 74 in it, 30522 in the config"),
    ({"max_seq_length": 25}, "its rows have 24 tokens, but --max_seq_length is 25"),
    ({"input_dir": "mixed", "output_dir": "new"}, "mixed/z_training.hdf5: " + AS_TRAINED.format("mixed/a_train")),
])
def test_training_on_what_does_not_fit_is_refused(workspace, changes, said):
    samples.write_config(workspace / "large.json")
    samples.write_config(workspace / "small.json", vocab_size=len(TOKENS) - 1)
    (workspace / "mixed").mkdir()
    shutil.copy("data/text_training_0.hdf5", "mixed/a_training.hdf5")
    shutil.copy("other/text_training_0.hdf5", "mixed/z_training.hdf5")
    resume = changes.get("output_dir") != "new"
    with pytest.raises(UserError, match=said):
        train(**{"resume_from_checkpoint": resume, "max_steps": 4, **changes})
    assert not (workspace / "new/log.json").exists() and not (workspace / "out/ckpt_3.pt").exists()


@pytest.mark.parametrize("checkpoint, changes, said", [
    ("out", {"vocab_file": "other.txt"}, "--vocab_file other.txt: its vocabulary has 74 tokens .* that of out/ckpt_2"),
    ("exported", {"vocab_file": "other.txt"}, "--vocab_file other.txt: its vocabulary has .* that of exported 74 tok"),
    ("out", {"vocab_file": "short.txt"}, "--vocab_file short.txt: 69 tokens, but vocab_size in the config is 74"),
    ("out", {"do_lower_case": 0}, "--do_lower_case 0: the data of out/ckpt_2.pt was lower-cased"),
    ("exported", {"do_lower_case": False}, "--do_lower_case 0: the data of exported was lower-cased"),
    ("old.pt", {}, "old.pt: carries no vocabulary: give --vocab_file"),
    ("old.pt", {"vocab_file": "cased.txt", "do_lower_case": 1}, "--vocab_file cased.txt: a cased vocabulary"),
    ("bare.pt", {"vocab_file": "vocab.txt"}, "bare.pt: does not say which model it is of: give its --config_file"),
    ("cut.pt", {}, "cut.pt: vocabulary: its lines are not the 74 tokens with that checksum"),
    ("out", {"config_file": "large.json"}, "out/ckpt_2.pt: vocab_size is 74 in it, 30522 in the config"),
])
def test_a_model_is_not_read_with_another_vocabulary(workspace, checkpoint, changes, said):
    samples.write_config(workspace / "large.json")
    (workspace / "short.txt").write_text("\n".join(TOKENS[:-5]))
    contents = torch.load("out/ckpt_2.pt", weights_only=True)
    del contents["checksum"]
    torch.save({key: value for key, value in contents.items() if key != "vocabulary"}, "old.pt")
    torch.save({"model": contents["model"]}, "bare.pt")
    torch.save(contents | {"vocabulary": contents["vocabulary"] | {"lines": "the\n"}}, "cut.pt")
    words = [f"--checkpoint={checkpoint}", *(f"--{name}={value}" for name, value in changes.items())]
    for command, more in ((fill_mask.main, [SENTENCE]), (export_to_huggingface.main, ["--output_dir=new"])):
        with pytest.raises(UserError, match=said):
            command([*words, *more])
    assert not list(workspace.glob("new/[!.]*"))


@pytest.mark.parametrize("words, said", [
    (["--checkpoint=out", "--eval_dir=other_held_out"], "--eval_dir other_held_out: .* that of out/ckpt_2.pt 74"),
    (["--checkpoint=exported", "--eval_dir=other_held_out"], "that of exported 74 tokens"),
    (["--checkpoint=out", "--eval_dir=cased_held_out"], "its vocabulary has 74 tokens, cased .* tokens, lower-cased"),
    (["--checkpoint=out", "--eval_dir=held_out", "--input_dir=other"], "--input_dir other: .* that of out/ckpt_2.pt"),
    (["--config_file=config.json", "--eval_dir=other_held_out", "--input_dir=data"], "that of --input_dir data 74"),
    (["--config_file=large.json", "--eval_dir=held_out"], "its vocabulary: 74 tokens, but vocab_size .* is 30522"),
])
def test_evaluating_on_what_does_not_fit_is_refused(workspace, words, said):
    samples.write_config(workspace / "large.json")
    with pytest.raises(UserError, match=said):
        evaluate.main([*words, "--no_cuda"])


def test_files_that_do_not_say_their_vocabulary_are_read_as_before(workspace, capsys):
    for folder in ("data", "held_out"):
        without_origin(workspace / folder)
    train(resume_from_checkpoint=True, max_steps=3, eval_dir="held_out")  # of a checkpoint that knows it
    assert torch.load("out/ckpt_3.pt", weights_only=True)["vocabulary"]["lower_case"] is True
    train(output_dir="new", json_summary="new/log.json", max_steps=1, eval_dir="held_out")
    assert torch.load("new/ckpt_1.pt", weights_only=True)["vocabulary"] == {}
    samples.write_config(workspace / "large.json", vocab_size=100)
    capsys.readouterr()
    train(config_file="large.json", output_dir="large", json_summary="large/log.json", max_steps=1, no_cuda=True)
    assert "was the data made with another vocabulary?" in capsys.readouterr().err
    tokens = answers(capsys, "--checkpoint=new", "--vocab_file=vocab.txt")
    assert tokens == answers(capsys, "--checkpoint=new", "--vocab_file=vocab.txt", "--do_lower_case=1")


@pytest.mark.parametrize("name, value, said", [
    ("vocabulary_sha256", 5, "sha256 is 5, no checksum of a vocabulary"),
    ("vocabulary_sha256", "f" * 63, "no checksum of a vocabulary"),
    ("vocabulary_size", -1, "size is -1, not a whole number"),
    ("vocabulary_size", [1, 2], "not a whole number"),
    ("vocabulary_lower_case", "perhaps", "lower_case is 'perhaps', neither true nor false"),
    ("vocabulary_lines", np.void(b"the sea"), "not the tokens of a vocabulary"),
    ("vocabulary_lines", np.void(zlib.compress(b"the\n")), "its lines are not the 74 tokens"),
    ("vocabulary_lines", 7, "its lines are not the 74 tokens")])
def test_malformed_attributes_of_a_shard_are_named(workspace, name, value, said):
    with h5py.File("data/text_training_0.hdf5", "a") as file:
        file.attrs[name] = value
    with pytest.raises(UserError, match=f"data/text_training_0.hdf5: vocabulary.*{said}"):
        train(output_dir="new")


def test_what_a_published_folder_leaves_open_follows_from_its_vocabulary(workspace):
    """Old folders have no tokenizer_config.json; and a vocabulary can be another model's."""
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (workspace / "exported" / name).unlink()
    assert read_checkpoint("exported")["vocabulary"].get("lower_case") is None
    shutil.copy("cased.txt", "exported/vocab.txt")
    assert read_checkpoint("exported")["vocabulary"]["lower_case"] is False
    with pytest.raises(UserError, match="--do_lower_case 1: the data of exported was cased"):
        fill_mask.main(["--checkpoint=exported", "--do_lower_case=1", SENTENCE])
    without_origin(workspace / "data")
    (workspace / "exported/vocab.txt").write_text("\n".join(TOKENS[:-5]))
    with pytest.raises(UserError, match="exported, its vocabulary: 69 tokens, but vocab_size in the config is 74"):
        train(init_checkpoint="exported", output_dir="new")


def test_a_domain_may_use_the_unused_places_of_a_published_vocabulary(workspace):
    train(input_dir="extended", init_checkpoint="exported", output_dir="new", json_summary="new/log.json", max_steps=1)
    saved = torch.load("new/ckpt_1.pt", weights_only=True)["vocabulary"]["lines"].splitlines()
    assert saved == known_vocabulary.EXTENDED_TOKENS
    with pytest.raises(UserError, match="--input_dir extended: its vocabulary has .* that of out/ckpt_2.pt"):
        train(input_dir="extended", resume_from_checkpoint=True, max_steps=4)


def pack(input_dir, output_dir, *more) -> None:
    pack_pretraining_data_pytorch.main([
        f"--input_dir={input_dir}", f"--output_dir={output_dir}", f"--max_sequence_length={samples.SEQUENCE_LENGTH}",
        f"--max_predictions_per_sequence={samples.PREDICTIONS}", "--n_processes=1", "--disable_progress_bar", *more])


def test_test_shards_are_packed_for_evaluation_alone(workspace, capsys):
    pack("data", "packed")
    pack("held_out", "packed_test", "--split=test")
    origins = [read_origin(next((workspace / folder).glob("*.hdf5"))) for folder in ("packed", "packed_test")]
    assert [origin.vocabulary.tokens for origin in origins] == [TOKENS, TOKENS]
    assert [len(origin.texts) for origin in origins] == [2, 2] and not {*origins[0].texts} & {*origins[1].texts}
    assert pytorch_packed_data_checker.main(["--input_dir=packed_test", "--unpacked_dir=held_out",
                                             "--n_processes=1"]) == 0
    train(input_dir="packed", eval_dir="packed_test", output_dir="new", json_summary="new/log.json", max_steps=1)
    both = [evaluated(capsys, f"--eval_dir={folder}") for folder in ("held_out", "packed_test")]
    assert both[0] == pytest.approx(both[1], rel=1e-4)
    with pytest.raises(UserError, match="--input_dir packed_test: no shard in it"):
        train(input_dir="packed_test", output_dir="other_new")
    with pytest.raises(UserError, match="--output_dir .*packed holds mixed.*, which this command did not write"):
        pack("held_out", "packed", "--split=test", "--overwrite")
    (workspace / "packed_test").rename(workspace / "packed/test")  # and among training shards
    for path in (workspace / "packed/test").glob("*.hdf5"):
        path.rename(workspace / "packed" / path.name)
    assert [shard.path.name for shard in find_shards("packed")] == ["mixed_strategies_part_0.hdf5"]


def evaluated(capsys, *words) -> list[float]:
    capsys.readouterr()
    evaluate.main(["--checkpoint=out", "--json", "--no_cuda", *words])
    figures = json.loads(capsys.readouterr().out)
    return [figures[name] for name in ("mlm_loss", "mlm_accuracy", "nsp_accuracy", "sequences", "masked_tokens")]


@pytest.mark.parametrize("known", [True, False])
def test_held_out_shards_that_are_trained_on_are_refused(workspace, capsys, known):
    """Whether the shards say what they were made from, or are of a program that does not."""
    for folder in ("data", "held_out") if not known else ():
        without_origin(workspace / folder)
    pack("data", "packed")
    pack("data", "packed_otherwise", "--seed=7", "--max_sequences_per_pack=2")
    shutil.copytree("data", "copied")
    shutil.copytree("held_out", "renamed")
    shutil.copy("data/text_training_1.hdf5", "renamed/text_test_1.hdf5")
    part = "mixed_strategies_part_0.hdf5"
    for training, held_out, name in (
            ("packed", "packed", part), ("data", "packed", part), ("packed", "packed_otherwise", part),
            ("copied", "packed", part), ("packed", "renamed", "text_test_1.hdf5"),
            ("data", "renamed", "text_test_1.hdf5")):
        said = f"--eval_dir {held_out}: {name} is, or was made from, what"
        with pytest.raises(UserError, match=f"{said} --input_dir {training} trains on"):
            train(input_dir=training, eval_dir=held_out, output_dir="new")
    evaluate.main(["--config_file=config.json", f"--input_dir={training}", f"--eval_dir={held_out}", "--no_cuda"])
    assert f"warning: {said} the model was trained on" in capsys.readouterr().err


def test_evaluation_names_text_that_the_checkpoint_was_trained_on(workspace, capsys):
    known_vocabulary.write_shards(workspace, "longer", TOKENS, max_seq_length=32)  # of the text of `data`
    for path in (workspace / "longer").glob("*.hdf5"):
        path.rename(path.with_name(path.name.replace("training", "test")))
    for folder, named in (("longer", True), ("held_out", False)):
        capsys.readouterr()
        evaluate.main(["--checkpoint=out", f"--eval_dir={folder}", "--no_cuda"])
        assert ("what the model was trained on" in capsys.readouterr().err) == named


def test_a_cased_vocabulary_is_not_used_on_lower_cased_text(workspace):
    import create_pretraining_data

    words = ["--input_file=data_training_0.txt", "--output_file=new.hdf5", "--vocab_file=cased.txt"]
    with pytest.raises(UserError, match="--vocab_file cased.txt: a cased vocabulary .* but --do_lower_case is 1"):
        create_pretraining_data.main(words)
    assert not (workspace / "new.hdf5").exists()
    create_pretraining_data.main([*words, "--do_lower_case=0"])
    assert read_origin("new.hdf5").vocabulary == Vocabulary.of(CASED_TOKENS, lower_case=False)
    assert find_shards("data")[0].origin.vocabulary.lower_case is True
