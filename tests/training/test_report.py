"""The report of real runs: one page that needs no other file, says only what is known, and can repeat the runs."""

import json
import re
import shlex
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest
import torch

import pack_pretraining_data_pytorch
import plot_training
from common.errors import UserError
from data.shards import find_shards, read_rows
from tests.support import samples, small_run
from tests.support.small_run import train
from tests.test_plot_training import write_log
from training.arguments import command_flags, parse_arguments
from training.report.pictures import MOST_POINTS, thinned
from training.report.results import verdict

ODD_NAME = "it's <b> & more"  # of a folder
SENTENCE = 'He said <b>"yes" & [MASK]</b>.'
CONTEXT_FREE = {"eval_context_free_mlm_loss": 6.4, "eval_context_free_mlm_accuracy": 0.142,
                "eval_nsp_larger_class": 0.5213, "eval_mask_loss": 6.875, "eval_mask_context_free_loss": 7.125,
                "eval_mask_accuracy": 0.0625}
EVALUATION = {"mlm_loss": 6.25, "mlm_accuracy": 0.15, "nsp_loss": 0.7, "nsp_accuracy": 0.532, "masked_tokens": 41234,
              "sequences": 2210, "context_free_mlm_loss": 6.5, "nsp_larger_class": 0.5213, "kept_loss": 2.125,
              "kept_context_free_loss": 1.875, "kept_accuracy": 0.7}
EXAMPLES = [{"sentence": SENTENCE, "masks": [{
    "words": [["<i>", 0.25], ["no", 0.125]], "frequent": [["the", 0.0625]], "true_word": "a&b", "rank": 1203,
    "frequency_rank": None}]}, {"sentence": "no mask", "masks": []}]
SECTIONS = ["Verdict", "Curves", "Held-out text", "Words for [MASK]", "Data", "Settings and speed", "Commands"]
VOID = {"meta", "br", "hr", "img", "input", "link"}
PANELS = 8  # of FIGURES that a run with an evaluation has
PHONE = 390  # pixels, the width of a phone's screen
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


class PageReader(HTMLParser):
    """What a page holds: tags with attributes, and the texts of the elements of each tag.  It must close each tag."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open, self.tags, self.texts = [], [], {}
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.texts.setdefault(tag, []).append("")
        self.open += [] if tag in VOID else [(tag, len(self.texts[tag]) - 1)]

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, number in self.open:
            self.texts[tag][number] += data

    def words(self, tag: str) -> list[str]:
        return [" ".join(text.split()) for text in self.texts.get(tag, [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Logs of two small runs on packed data, of which the first has two phases, and an evaluation and examples."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_run.write_workspace(folder)
        pack_pretraining_data_pytorch.main([
            "--input_dir=data", "--output_dir=packed", f"--max_sequence_length={samples.SEQUENCE_LENGTH}",
            f"--max_predictions_per_sequence={samples.PREDICTIONS}"])
        options = {"input_dir": "packed", "eval_dir": "held_out", "eval_freq": 3, "use_zero_optimizer": "False"}
        train(**options, json_summary="one.json", profile_steps="2:3")
        train(**options, json_summary="two.json", phase2=True, resume_from_checkpoint=True, max_steps=4)
        train(**options, json_summary="other.json", output_dir=ODD_NAME, max_steps=3, log_freq=1.0)
    for name in ("one.json", "two.json", "other.json"):
        lines = samples.log_lines(folder / name)
        for file, known in ((f"line_{name}", CONTEXT_FREE), (name, {})):  # the latter as before there was a line
            (folder / file).write_text("".join(f"DLLL {json.dumps(knowing(line, known))}\n" for line in lines))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "examples.json").write_text(json.dumps(EXAMPLES))
    return folder


def knowing(line: dict, known: dict) -> dict:
    """A line of a log; if it is an evaluation, with these figures of what a model without context reaches."""
    if "eval_mlm_loss" not in line["data"]:
        return line
    of_line = re.compile("eval_(mask|kept|replaced)_|.*context_free|eval_nsp_larger")
    kept = {name: value for name, value in line["data"].items() if not of_line.match(name)}
    return line | {"data": kept | known}


@pytest.fixture
def report(folder, tmp_path, monkeypatch):
    """Writes a report on logs of `folder`, and reads it."""
    monkeypatch.chdir(folder)

    def write(*words) -> PageReader:
        plot_training.main([*words, "--report", str(tmp_path / "report.html")])
        return PageReader(tmp_path / "report.html")

    return write


def full_report(report) -> PageReader:
    return report("line_one.json", "line_two.json", "other.json", "--evaluation", "evaluation.json",
                  "--examples", "examples.json")


def test_the_page_has_all_sections_and_needs_no_other_file(report):
    page = full_report(report)
    assert page.words("h2") == SECTIONS
    assert not {"script", "link", "img", "iframe", "image", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|//\w|@import", page.text)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", page.text))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert ids and len(ids) == len(set(ids))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_text_is_escaped(report):
    page = full_report(report)
    assert SENTENCE in page.words("article")[0] and "<i>25.0 %" in page.words("article")[0]
    assert any(ODD_NAME in text for text in page.words("h3")) and "“a&b”" in page.words("article")[0]
    assert "b" not in {tag for tag, _ in page.tags}


def test_the_commands_of_the_page_repeat_the_runs(report, folder):
    page = report("line_one.json", "line_two.json", "other.json")
    found = [shlex.split(text.replace("\\\n", " ")) for text in page.texts["pre"]]
    assert len(found) == 3
    for words, log in zip(found, ("one.json", "two.json", "other.json"), strict=True):
        logged = samples.log_lines(folder / log)[0]["data"]
        assert words[:2] == ["python3", "run_pretraining.py"]
        parsed = json.loads(json.dumps(vars(parse_arguments(words[2:]))))
        assert parsed == {name: logged[name] for name in parsed}
        assert not any(word.startswith(("--seed", "--log_freq", "--use_zero", "--hmp", "--local")) for word in words)
    assert "--profile_steps=2:3" in found[0] and f"--output_dir={ODD_NAME}" in found[2]


@pytest.mark.parametrize("changes", [
    {"hmp": True, "peak_tflops": 2.5, "loss_scale": 128.0}, {"use_zero_optimizer": "true", "use_cpu_kernels": "0"},
    {"attention": "sdpa", "enable_packed_data_mode": "False", "json_summary": ""},
    {"loss_scale": 0.0, "log_freq": 3.0, "seed": 0, "profile": "yes"}])
def test_flags_that_differ_from_the_defaults_are_typed_again(changes):
    args = vars(parse_arguments(small_run.flags(**changes)))
    words = command_flags(json.loads(json.dumps(args)))
    assert vars(parse_arguments(words)) == args
    assert not any(word.startswith(("--seed=42", "--max_skipped", "--loss_scale=0")) for word in words)


def test_both_phases_and_several_runs_appear(report):
    page = full_report(report)
    assert page.words("ul")[0] == f"out{ODD_NAME}"  # the legend
    assert page.words("p")[:2] == ["out: 10 steps over two phases", f"{ODD_NAME}: 3 steps"]
    assert sum(tag == "svg" for tag, _ in page.tags) == PANELS
    titles = {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"}
    assert {"Training loss", "MLM loss", "NSP loss", "Learning rate", "Throughput", "Held-out MLM loss"} <= titles
    assert page.words("thead").count("Phase 1Phase 2") == 2  # data and settings of the first run
    one = report("line_one.json")
    assert "over two phases" not in one.text and "Dotted" not in one.text and 'class="legend"' not in one.text


def test_the_line_is_drawn_in_the_panel_of_the_held_out_loss(report):
    def dashes(page):
        picture = re.search(r'<svg[^>]*aria-label="Held-out MLM loss".*?</svg>', page.text, re.DOTALL)[0]
        return len(re.findall(r'stroke-dasharray: [^"]*"', picture))

    with_line, without = report("line_one.json", "line_two.json"), report("one.json", "two.json")
    assert dashes(with_line) == dashes(without) + 2  # one for each phase
    assert "Dashed" in with_line.text and "Dashed" not in without.text


def test_what_is_missing_is_left_out(report, tmp_path, monkeypatch):
    log = write_log(tmp_path / "old.json", 5, held_out=False)  # no held-out figures, no data set, few flags
    page = report(log)
    assert page.words("h2") == ["Curves", "Settings and speed"]
    assert page.words("th") == ["", "Phase 1", "Steps", "Throughput"]
    (tmp_path / "bare.json").write_text("".join(
        f"{line}\n" for line in (tmp_path / "old.json").read_text().splitlines() if "PARAMETER" not in line))
    assert report(str(tmp_path / "bare.json")).words("h2") == ["Curves"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.json").write_text('[{"sentence": "a", "masks": []}]')
    assert "Words for" not in report(log, "--examples", "none.json").text


def test_a_run_that_does_not_know_the_line_has_no_verdict(report):
    page = report("one.json")
    assert page.words("h2") == ["Curves", "Held-out text", "Data", "Settings and speed", "Commands"]
    assert page.words("tr")[0] == "tokensloss (nats)accuracy" and page.words("tbody")[0].startswith("all")
    assert "learned" not in page.text


@pytest.mark.parametrize("loss, line, text", [
    (6.05, 6.42, "0.37 nats below the line: it has learned from context."),
    (6.41, 6.42, "0.01 nats below the line: it has learned from context."),
    (6.418, 6.42, "Not below the line: nothing learned from context yet."),
    (6.48, 6.42, "Not below the line: nothing learned from context yet."),
    (None, 6.42, "Not below the line: nothing learned from context yet.")])
def test_only_what_lies_below_the_line_has_learned(loss, line, text):
    assert verdict(loss, line) == text


def test_the_verdict_is_on_the_last_evaluation(report, folder, tmp_path):
    page = report("line_one.json", "line_two.json")
    last = [line["data"] for line in samples.log_lines(folder / "two.json") if "eval_mlm_loss" in line["data"]][-1]
    text, = [text for text in page.words("p") if "The line is at" in text]
    assert text.startswith("Not below the line: nothing learned from context yet. out, after step 10: ")
    assert f"is {last['eval_mlm_loss']:.2f} nats, over {last['eval_masked_tokens']} masked tokens." in text
    assert "at 6.40 nats" in text and page.text.count("learned") == 1
    lines = (folder / "line_two.json").read_text().replace(str(last["eval_mlm_loss"]), "null")
    (tmp_path / "diverged.json").write_text(lines)
    assert "is not a finite number" in report("line_one.json", str(tmp_path / "diverged.json")).text


def test_the_verdict_is_on_the_files_where_no_log_has_the_line(report):
    text, = [text for text in report("one.json", "--evaluation", "evaluation.json").words("p") if "The line" in text]
    assert text.startswith("0.25 nats below the line: it has learned from context. evaluation.json: ")


def test_held_out_figures_stand_in_a_table_by_kind_of_mask(report):
    page = report("line_one.json", "--evaluation", "evaluation.json")
    first, second = page.words("table")[:2]
    assert first == ("tokensloss (nats)without contextbelow the lineaccuracy "
                     "kept2.1251.875−0.25070.0 % all6.2506.500+0.25015.0 %")
    assert "[MASK]6.8757.125+0.2506.2 %" in second
    assert "NSP accuracy 53.2 %; always naming the larger class has 52.1 %." in page.words("p")
    assert "Measured on 41,234 masked tokens in 2,210 sequences." in page.words("p")


def test_examples_show_both_word_lists_and_the_rank(report):
    card, = full_report(report).words("article")
    assert card == (f"{SENTENCE} the model<i>25.0 %no12.5 %frequency alonethe6.2 %True word: “a&b”, rank 1,203 for "
                    "the model.")


def test_the_data_are_those_of_the_packer(report, folder):
    path = folder / "packed_metadata.json"
    packing = json.loads(path.read_text())
    table, = [text for text in report("one.json").words("table") if "Sequences per row" in text]
    assert f"Rows{packing['new_number_of_samples']} Sequences25 Row length24 tokens" in table
    real = sum(int(read_rows(shard)["input_mask"].sum()) for shard in find_shards(folder / "data"))
    assert f"Real tokens before packing{100 * real / (25 * 24):.1f} %" in table and "[UNK]" not in table
    share = 100 * real / (24 * packing["new_number_of_samples"])
    assert f"Real tokens after packing{share:.1f} %" in table
    try:
        path.write_text(json.dumps(packing | {"unknown_share": 0.00123, "max_sequences_per_pack": "odd"}))
        assert "[UNK]0.12 % of the tokens" in report("one.json").words("table")[1]
        path.write_text("{")
        with pytest.raises(UserError, match=r"packer's metadata .*packed_metadata.json: no JSON"):
            report("one.json")
    finally:
        path.write_text(json.dumps(packing))


def test_the_log_records_batch_cards_and_software(report, folder):
    record = samples.log_lines(folder / "one.json")[0]["data"]
    plan = record["batch_plan"]
    assert record["world_size"] == 1 and record["software"]["PyTorch"] == torch.__version__
    assert plan["micro_batch_size"] == 4 and record["machine"]["cores"] >= 1
    assert record["descriptions"]["optimizer"].startswith("optimizer: ") and "" not in record["descriptions"].values()
    text, = [text for text in report("one.json").words("tbody") if text.startswith("Batch")]
    product = 4 * plan["accumulation_steps"] * plan["sequences_per_row"]
    assert text.startswith(f"Batch4 rows a micro-batch × {plan['accumulation_steps']} accumulation step")
    assert f"{plan['sequences_per_row']:.4g} sequences a row × 1 card = {product:.0f} sequences Steps6 of 6" in text
    assert "Learning rate0.01 at its peak, --lr_schedule poly, --optimizer lamb Warm-up2 steps (30.0 %)" in text
    assert torch.__version__ in text


def test_only_what_was_asked_for_is_written(report, folder, tmp_path):
    report("one.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"] and not list(folder.glob("*.png"))
    report("one.json", "--output", str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("flag, contents, message", [
    ("--evaluation", "[]", "--evaluation bad.json: not the output of evaluate.py --json"),
    ("--evaluation", '{"mlm_loss": NaN}', "it has no number mlm_loss"),
    ("--evaluation", "\xff{", "--evaluation bad.json: no JSON"),
    ("--evaluation", None, "--evaluation bad.json: No such file"),
    ("--examples", "{}", "--examples bad.json: not a list"),
    ("--examples", '[{"masks": []}]', "example 1: it has no text named sentence"),
    ("--examples", '[{"sentence": "a"}]', "example 1: it has no list named masks"),
    ("--examples", '[{"sentence": "a", "masks": [{"words": [["a", 2]]}]}]', "numbers? from 0 to 1"),
    ("--examples", '[{"sentence": "a", "masks": [{"true_word": 3}]}]', "true_word is not a text"),
    ("--examples", '[{"sentence": "a", "masks": [{"rank": "3"}]}]', "rank and frequency_rank are not numbers")])
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, monkeypatch, flag, contents, message):
    log = write_log(tmp_path / "log.json", 5)
    monkeypatch.chdir(tmp_path)
    if contents is not None:
        (tmp_path / "bad.json").write_bytes(contents.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        plot_training.main([log, "--report", "report.html", flag, "bad.json"])
    assert not (tmp_path / "report.html").exists()


def test_files_for_the_report_need_a_report(capsys):
    with pytest.raises(SystemExit) as end:
        plot_training.main(["log.json", "--examples", "e.json"])
    assert end.value.code == 2 and "--examples needs --report" in capsys.readouterr().err


def test_a_long_curve_keeps_its_ends_and_its_peaks():
    curve = dict.fromkeys(range(1, 10_001), 1.0) | {777: 9.0, 5001: -3.0}
    short = thinned(curve)
    assert len(short) <= MOST_POINTS + 2 and list(short) == sorted(short)
    assert short[777] == 9.0 and short[5001] == -3.0 and {1, 10_000} <= set(short)
    assert thinned({1: 2.0}) == {1: 2.0}


def test_a_browser_shows_the_page_within_the_width_of_a_phone(report, tmp_path):
    if BROWSER is None:
        pytest.skip("no chromium and no chromium-browser is installed")
    probe = ("<body><script>onload = () => { const page = frames[0].document.documentElement;"
             "document.title = `${page.clientWidth} ${page.scrollWidth} ${page.scrollHeight}` }</script>"
             f'<iframe style="width:{PHONE}px; height:800px; border:0" srcdoc="{escape(full_report(report).text)}">')
    (tmp_path / "probe.html").write_text(probe)
    shown = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                            f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars", "--dump-dom",
                            f"file://{tmp_path}/probe.html"], capture_output=True, text=True, timeout=120)
    width, needed, height = map(int, re.search(r"<title>(\d+) (\d+) (\d+)</title>", shown.stdout).groups())
    assert width == PHONE and needed <= width and height > 3000
    assert "CONSOLE" not in shown.stderr
