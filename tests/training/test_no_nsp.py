"""Training without next sentence prediction, from the data to the exported model."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

import create_pretraining_data
import evaluate
import export_to_huggingface
import fill_mask
import pack_pretraining_data_pytorch
import pytorch_packed_data_checker
import run_pretraining
from checkpoint.folder import read_checkpoint
from common.bert_config import BertConfig
from common.errors import UserError
from data.dataloader import batches_once
from data.shards import find_shards
from data.tokenizer import load_vocabulary
from modeling import BertForPreTraining
from tests.support import samples, small_run
from tests.support.preparation import sentences, write_vocabulary

LENGTH = samples.SEQUENCE_LENGTH
NSP_FIGURES = {"average_nsp_loss", "nsp_loss", "eval_nsp_loss", "eval_nsp_accuracy", "eval_nsp_larger_class"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards of both kinds, packed ones without NSP, a config and a vocabulary; in whole words, masked in training."""
    folder = tmp_path_factory.mktemp("no_nsp")
    write_vocabulary(folder / "vocab.txt")
    size = len(load_vocabulary(folder / "vocab.txt"))
    samples.write_config(folder / "config.json", vocab_size=size)
    for split, seeds in (("training", range(30)), ("test", range(30, 60))):
        (folder / f"{split}.txt").write_text("\n\n".join("\n".join(sentences(6, seed)) for seed in seeds))
    for kind, flags in (("without", ("--no_nsp", "--whole_word_mask")), ("with", ())):
        for split in ("training", "test"):
            (folder / kind / split).mkdir(parents=True)
            create_pretraining_data.main([
                f"--input_file={folder}/{split}.txt", f"--output_file={folder}/{kind}/{split}/s_{split}.hdf5",
                f"--vocab_file={folder}/vocab.txt", f"--max_seq_length={LENGTH}", "--dynamic_masking", *flags])
    pack_pretraining_data_pytorch.main([
        f"--input_dir={folder}/without/training", f"--output_dir={folder}/packed", f"--max_sequence_length={LENGTH}",
        "--n_processes=1", "--disable_progress_bar"])
    return folder


@pytest.fixture
def workspace(made, tmp_path, monkeypatch):
    """A folder for the results, with everything else in its place."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(**changes) -> dict:
    """The figures of every log line of a run, by step."""
    log = Path(f"{changes.get('output_dir', 'out')}.json")
    small_run.train(**{"input_dir": "without/training", "json_summary": log, "peak_tflops": 1, **changes})
    return small_run.logged_steps(log)


def test_packing_keeps_the_sequences_and_that_there_is_no_second_task(workspace, capsys):
    packed, unpacked = find_shards("packed")[0], find_shards("without/training")[0]
    assert packed.objective == unpacked.objective and not packed.objective.nsp and packed.rule == unpacked.rule
    assert packed.prediction_slots == unpacked.prediction_slots + 3
    check = ["--input_dir=packed", "--n_processes=1", "--disable_progress_bar"]
    assert pytorch_packed_data_checker.main([*check, "--unpacked_dir=without/training"]) == 0
    assert pytorch_packed_data_checker.main([*check, "--unpacked_dir=with/training"]) == 1
    assert "without next sentence prediction" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, {"input_dir": "packed", "use_cpu_kernels": False, "normalize_loss": "tokens"}])
def test_a_run_knows_no_second_task_and_goes_on_as_if_never_stopped(workspace, capsys, changes):
    """Neither in its log nor in its checkpoints; with and without the CPU kernels."""
    flags = {"eval_dir": "without/test", **changes}
    whole = train(**flags)
    printed = capsys.readouterr().out
    assert ", without next sentence prediction, whole words masked" in printed
    assert "NSP accuracy" not in printed and "nsp" not in printed.partition("epoch 0 step 1")[2]
    for figures in whole.values():
        assert not NSP_FIGURES & figures.keys() and figures["step_mean_loss"] == figures["mlm_loss"]
        assert figures["average_loss"] == figures["average_mlm_loss"]
    train(output_dir="parts", steps_this_run=3, **flags)
    assert train(output_dir="parts", resume_from_checkpoint=True, **flags) == whole
    contents = read_checkpoint("out/ckpt_6.pt")
    names = set(contents["model"])
    assert not [name for name in names if "pooler" in name or "seq_relationship" in name]
    assert sum(len(group["params"]) for group in contents["optimizer"]["param_groups"]) == len(names) - 1  # one is tied


def test_the_loss_is_that_of_the_masked_tokens_of_the_model_with_both_heads(workspace):
    config = BertConfig.from_json_file("config.json")
    torch.manual_seed(1)
    both = BertForPreTraining(config).eval()
    torch.manual_seed(1)
    alone = BertForPreTraining(config).without_nsp().eval()
    torch.manual_seed(1)
    in_chunks = BertForPreTraining(config, loss_chunk=5).without_nsp().eval()
    batch = next(batches_once(find_shards("with/training"), 8, config.vocab_size))
    expected = both(batch)
    del batch["next_sentence_labels"]
    losses = alone(batch)
    assert losses["loss"] is losses["mlm_loss"] and set(losses) == {"loss", "mlm_loss"}
    assert_close(losses["loss"], expected["mlm_loss"])
    assert_close(in_chunks(batch)["loss"], expected["mlm_loss"])
    assert sum(p.numel() for p in both.parameters()) - sum(p.numel() for p in alone.parameters()) == 25 * 24 + 25 * 2


def test_what_does_not_fit_together_is_refused_in_a_line(workspace):
    train(max_steps=1)
    train(output_dir="other", input_dir="with/training", max_steps=1)
    kept = len(read_checkpoint("out/ckpt_1.pt")["model"])
    for flags, said in (
            ({"resume_from_checkpoint": True, "input_dir": "with/training"},
             "out/ckpt_1.pt: the training data has next sentence prediction, the checkpoint was made without"),
            ({"resume_from_checkpoint": True, "output_dir": "other"},
             "other/ckpt_1.pt: the checkpoint has next sentence prediction, the training data was made without"),
            ({"output_dir": "new", "eval_dir": "with/test"},
             "the shards of --input_dir without/training were made with --no_nsp, those of --eval_dir with/test were"),
            ({"output_dir": "new", "input_dir": "with/training", "eval_dir": "without/test"},
             "the shards of --eval_dir without/test were made with --no_nsp, those of --input_dir with/training")):
        with pytest.raises(UserError, match=said) as refusal:
            train(**flags)
        assert "\n" not in str(refusal.value)
    train(output_dir="new", init_checkpoint="other/ckpt_1.pt", max_steps=1)  # its weights alone are welcome
    assert len(read_checkpoint("new/ckpt_1.pt")["model"]) == kept < len(read_checkpoint("other/ckpt_1.pt")["model"])


def test_a_dry_run_an_evaluation_a_mask_and_an_export_work(workspace, capsys):
    run_pretraining.main(small_run.flags(do_train=None, dry_run=True, input_dir="packed", eval_dir="without/test"))
    assert "steps of" in capsys.readouterr().out
    train(max_steps=2)
    capsys.readouterr()
    model = ["--checkpoint=out/ckpt_2.pt", "--config_file=config.json"]
    for data in ("without/test", "with/test"):
        evaluate.main([*model, f"--eval_dir={data}", "--json", "--no_cuda"])
        figures = json.loads(capsys.readouterr().out)
        assert figures["mlm_loss"] > 0 and figures["sequences"] > 20 and not [key for key in figures if "nsp" in key]
    evaluate.main([*model, "--eval_dir=without/test", "--no_cuda"])
    assert "NSP" not in capsys.readouterr().out
    fill_mask.main([*model, "--vocab_file=vocab.txt", "the sea is [MASK]"])
    assert "the sea is [MASK]\n    " in capsys.readouterr().out
    export_to_huggingface.main([*model, "--vocab_file=vocab.txt", "--output_dir=exported", "--log", "out.json"])
    assert "transformers.BertForMaskedLM.from_pretrained('exported')" in capsys.readouterr().out
    card = (workspace / "exported/README.md").read_text()
    assert "has no next-sentence head" in card and "next-sentence-prediction" not in card
    theirs, report = transformers.BertForMaskedLM.from_pretrained("exported", output_loading_info=True)
    assert not any(report.values()), report
    encoder, report = transformers.BertModel.from_pretrained("exported", variant="encoder", add_pooling_layer=False,
                                                             output_loading_info=True)
    assert not any(report.values()), report
    ours = BertForPreTraining(BertConfig.from_json_file("config.json")).without_nsp().eval()
    ours.load_state_dict(read_checkpoint("out/ckpt_2.pt")["model"])
    ids = torch.tensor([[2, 9, 4, 12, 3]])
    batch = fill_mask.one_row(ids[0].tolist(), [2])
    with torch.no_grad():
        assert_close(ours.logits(batch)[0][0, 0, :theirs.config.vocab_size], theirs.eval()(ids).logits[0, 2],
                     atol=1e-5, rtol=1e-5)
    train(output_dir="again", init_checkpoint="exported", max_steps=1)
    assert encoder.pooler is None and (workspace / "again/ckpt_1.pt").exists()
