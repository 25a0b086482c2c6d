"""The commands of scripts/ and of the documents: every flag exists, and the recipes' numbers are right.  The documents'
links lead somewhere."""

import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from common import cli
from training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent.parent
STANDIN = ROOT / "tests" / "launcher_standin"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
             *(ROOT / folder / "README.md" for folder in ("benchmarks", "examples/fine_tuning", "tests/gaudi_standin"))]
FEWEST_COMMANDS = {"README.md": 7, "docs/data.md": 10, "docs/training.md": 8}  # found in them, or the search is broken
RECIPES = sorted(path.name for path in (ROOT / "scripts").glob("bert_*.sh"))
FOLDERS = "data/|benchmarks/|tools/|scripts/|examples/fine_tuning/"  # of scripts, beside the root
ELISION = re.compile("…")  # words left out
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")  # to a file, to a heading, or both


def recorded(recipe: str, phase, folder: Path, *flags, **variables) -> list[str]:
    """The words of the command that a recipe runs, the launcher's first."""
    environment = {"PATH": f"{STANDIN}{os.pathsep}{os.environ['PATH']}", "PYTHON": "python", "OPEN_MPI": "4.1.5",
                   "RECORD": str(folder / "record"), "NODE_RANK": "2", **variables}
    subprocess.run(["bash", f"scripts/{recipe}", str(phase), *flags], cwd=ROOT, env=environment, check=True,
                   capture_output=True)
    return (folder / "record").read_text().splitlines()


def launcher_and_flags(words: list[str]) -> tuple[list[str], list[str]]:
    place = words.index("run_pretraining.py")
    return words[:place], words[place + 1:]


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_parse_with_either_launcher(tmp_path, recipe, phase, launcher):
    words = recorded(recipe, phase, tmp_path, "--seed=7", LAUNCHER=launcher)
    args = parse_arguments(launcher_and_flags(words)[1])
    assert (args.phase2, args.max_seq_length, args.max_steps) == [(False, 128, 7038), (True, 512, 1563)][phase - 1]
    assert args.use_habana and args.hmp and args.seed == 7
    assert Path(ROOT, args.config_file).exists() and Path(ROOT, args.hmp_bf16).exists()


@pytest.mark.parametrize("recipe, cards, sequences", [
    ("bert_large_8_cards.sh", 8, (65536, 32768)), ("bert_large_32_cards.sh", 32, (65536, 32768)),
    ("bert_large_1_card.sh", 1, (8192, 4096)), ("bert_1.2B_zero.sh", 8, (8192, 8192))])
def test_recipes_have_the_published_batch(tmp_path, recipe, cards, sequences):
    for phase in (1, 2):
        launcher, flags = launcher_and_flags(recorded(recipe, phase, tmp_path))
        args = parse_arguments(flags)
        assert args.train_batch_size * cards == sequences[phase - 1]
        assert cards == (int(launcher[launcher.index("-n") + 1]) if "-n" in launcher else 1)
        assert args.use_zero_optimizer == ("zero" in recipe)


def test_recipes_start_mpirun_as_its_release_wants_it(tmp_path):
    def launcher(recipe, **variables):
        return launcher_and_flags(recorded(recipe, 1, tmp_path, **variables))[0]

    python = str(STANDIN / "python")
    assert launcher("bert_large_8_cards.sh") == [
        "mpirun", "--allow-run-as-root", "-n", "8", "--bind-to", "core", "--map-by", "socket:PE=7", "--rank-by", "core",
        "--report-bindings", python]
    four = launcher("bert_large_32_cards.sh", MPI_ROOT="/opt/openmpi", GC_KERNEL_PATH="/usr/lib/kernels.so")
    assert four == [
        "mpirun", "--allow-run-as-root", "--mca", "plm_rsh_args", "-p 3022", "--prefix", "/opt/openmpi", "-n", "32",
        "--bind-to", "core", "--map-by", "ppr:4:socket:PE=7", "--rank-by", "core", "--report-bindings",
        "--mca", "btl_tcp_if_include", "10.10.100.101/16",
        "-H", "10.10.100.101:16,10.10.100.102:16,10.10.100.103:16,10.10.100.104:16",
        "-x", "GC_KERNEL_PATH", "-x", "MASTER_ADDR", "-x", "MASTER_PORT", "-x", "PATH",
        "-x", "PT_HPU_RECIPE_CACHE_CONFIG", python]
    five = launcher("bert_large_32_cards.sh", MPI_ROOT="/opt/openmpi", OPEN_MPI="5.0.8", PE="5")
    assert {"plm_ssh_args", "ppr:4:socket:PE=5", "slot"} < set(five)
    assert five[five.index("ras_base_launch_orted_on_hn") - 1:][:3] == ["--mca", "ras_base_launch_orted_on_hn", "1"]
    assert launcher("bert_large_8_cards.sh", MAPPING="--bind-to none")[4:] == ["--bind-to", "none", python]


def test_every_variable_that_changes_what_a_rank_does_is_passed_on(tmp_path):
    passed_on = {"PT_HPU_LAZY_MODE": "1", "HCCL_SOCKET_IFNAME": "eth1", "HABANA_LOGS": "/logs",
                 "GLOO_SOCKET_IFNAME": "eth1", "FI_PROVIDER": "verbs", "RDMAV_FORK_SAFE": "1", "OMP_NUM_THREADS": "4",
                 "LD_LIBRARY_PATH": "/lib", "LD_PRELOAD": "", "PYTHONPATH": "/code",
                 "PT_HPU_RECIPE_CACHE_CONFIG": "/cache,False,1"}
    words = recorded("bert_large_32_cards.sh", 1, tmp_path, **passed_on, HOME="/root", OMPI_MCA_x="1", SECRET="s")
    launcher = launcher_and_flags(words)[0]
    names = {name for option, name in zip(launcher, launcher[1:], strict=False) if option == "-x"}
    assert names == {*passed_on, "PATH", "MASTER_ADDR", "MASTER_PORT"}


@pytest.mark.parametrize("device, mode, flags, cache", [
    ("hpu", None, ["--use_habana", "--use_lazy_mode=True"], True),
    ("hpu", "compile", ["--use_habana", "--use_torch_compile"], True),
    ("hpu", "eager", ["--use_habana", "--use_lazy_mode=False"], True),
    ("cuda", None, [], False),
    ("cuda", "compile", ["--use_torch_compile"], False),
    ("cpu", "eager", ["--no_cuda"], False),
])
def test_recipes_choose_the_mode(tmp_path, device, mode, flags, cache):
    variables = {"DEVICE": device, **({"MODE": mode} if mode else {})}
    recipe = "bert_large_32_cards.sh"
    launcher, words = launcher_and_flags(recorded(recipe, 1, tmp_path, **variables))
    every = {"--use_habana", "--use_lazy_mode=True", "--use_lazy_mode=False", "--use_torch_compile", "--no_cuda"}
    assert [word for word in words if word in every] == flags
    assert ("PT_HPU_RECIPE_CACHE_CONFIG" in launcher) == cache
    assert "PT_HPU_RECIPE_CACHE_CONFIG" not in recorded(recipe, 1, tmp_path, **variables, RECIPE_CACHE="")


def test_recipes_start_torchrun_on_each_server(tmp_path):
    launcher, _ = launcher_and_flags(recorded("bert_large_32_cards.sh", 1, tmp_path, LAUNCHER="torchrun"))
    assert launcher == ["python", "-m", "torch.distributed.run", "--nnodes=4", "--nproc_per_node=8", "--node_rank=2",
                        "--master_addr=10.10.100.101", "--master_port=12345"]


@pytest.mark.parametrize("phase, variables, message", [
    ("3", {}, "usage: bash scripts/bert_large_32_cards.sh PHASE"),
    ("1", {"LAUNCHER": "slurm"}, "LAUNCHER is 'slurm', not one of: mpirun torchrun"),
    ("1", {"DEVICE": "tpu"}, "DEVICE is 'tpu', not one of: hpu cuda cpu"),
    ("1", {"MODE": "graph"}, "MODE is 'graph', not one of: lazy compile eager"),
    ("1", {"CARDS_PER_SERVER": "0"}, "CARDS_PER_SERVER is '0'"),
    ("1", {"PYTHON": "no-such-python"}, "PYTHON is 'no-such-python'"),
    ("1", {"LAUNCHER": "torchrun", "NODE_RANK": ""}, "error: NODE_RANK is not set"),
])
def test_recipes_name_what_is_wrong(tmp_path, phase, variables, message):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        recorded("bert_large_32_cards.sh", phase, tmp_path, **variables)
    assert message in failure.value.stderr.decode()
    assert not (tmp_path / "record").exists()


def commands(text: str) -> list[tuple[str, list[str], bool]]:
    """The scripts of this repository that a document runs, the words behind each, and whether no word is left out."""
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", text, flags=re.M))]
    found = []
    for command in lines + spans:
        match = re.search(rf"(?:^|[\s/])((?:{FOLDERS})?(\w+\.(?:py|sh)))(?: (.*)|$)", command)
        if match and len(command.split()) > 1 and (ROOT / match[1]).exists():
            words = shlex.split(re.sub(r"[\[\]]", "", match[3] or ""), comments=True)
            mentioned = command.startswith(match[1])  # without an interpreter in front
            found.append((match[1], words, not mentioned and not any(ELISION.search(word) for word in words)))
    return found


def parser_of(script: str, monkeypatch) -> cli.ArgumentParser:
    """The parser that a script makes for its command line."""
    made = []

    def catch(parser, argv=None, namespace=None):
        made.append(parser)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(cli.ArgumentParser, "parse_args", catch)
        with pytest.raises(InterruptedError):
            runpy.run_path(str(ROOT / script))["main"]([])
    return made[0]


def problem(script: str, words: list[str], whole: bool, monkeypatch) -> str | None:
    """What is wrong with a command of a Python script of ours, or None; where it is not whole, flags alone count."""
    parser = parser_of(script, monkeypatch)
    flags = [cli.with_underscores(word).partition("=")[0] for word in words if word.startswith("-")]
    unknown = [flag for flag in flags if flag not in parser._option_string_actions]
    if unknown:
        return f"{script} has no flag {unknown[0]}"
    if "--help" in flags or not whole:
        return None
    try:
        parse_arguments(words) if script == "run_pretraining.py" else parser.parse_args(words)
    except SystemExit:
        return f"{script} does not take {shlex.join(words)}"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_the_documents_parses(document, monkeypatch, tmp_path):
    found = commands(document.read_text(encoding="utf-8"))
    assert len(found) >= FEWEST_COMMANDS.get(str(document.relative_to(ROOT)), 0)
    for script, words, whole in found:
        if script.endswith(".py"):
            assert problem(script, words, whole, monkeypatch) is None
        elif Path(script).name in RECIPES:
            assert parse_arguments(launcher_and_flags(recorded(Path(script).name, *words[:1], tmp_path, *words[1:]))[1])


def anchors(text: str) -> set[str]:
    """The names that the headings of a document have in links to them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_the_documents_leads_somewhere(document):
    for path, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("text", [
    "    mpirun -n 8 $PYTHON run_pretraining.py --no_such_flag …\n",
    "    $PYTHON run_pretraining.py --do_train \\\n        --config_file=c --input_dir=d --train_batch=4\n",
    "see `python3 evaluate.py --checkpoint C\n--epochs 3`",
    "    python benchmarks/packing.py --jason\n",
])
def test_a_flag_that_does_not_exist_is_found(text, monkeypatch):
    (script, words, whole), = commands(text)
    assert "has no flag" in problem(script, words, whole, monkeypatch)
