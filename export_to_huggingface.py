"""Export a checkpoint to a Hugging Face model folder, which the transformers library loads.

    python3 export_to_huggingface.py --checkpoint results/checkpoints --output_dir exported \\
        --log results/phase1.json results/phase2.json

Then, in Python: transformers.BertForPreTraining.from_pretrained("exported"), or BertForMaskedLM where the training
data was made with --no_nsp.  run_pretraining.py takes such a folder as its --init_checkpoint.  The export itself does
not need transformers.
"""

import tempfile
from pathlib import Path

from common import cli
from common.errors import UserError
from common.locks import LOCK_NAME, folder_lock
from common.object_locks import prefix_lock
from common.object_store import S3Folder, is_s3, patiently
from devices import gaudi_environment

# The flags of a run (the PARAMETER line of its log) that the model card shows
CARD_FLAGS = ("init_checkpoint", "input_dir", "max_seq_length", "train_batch_size", "gradient_accumulation_steps",
              "optimizer", "learning_rate", "lr_schedule", "warmup_proportion", "max_steps", "seed", "hmp", "fp16",
              "device")
CARD_FIGURES = ("final_loss", "eval_mlm_loss", "eval_context_free_mlm_loss", "eval_mlm_accuracy", "eval_nsp_accuracy",
                "training_sequences_per_second", "steady_sequences_per_second")


def main(argv=None) -> None:
    args = parse_arguments(argv)
    if is_s3(args.output_dir):
        export_to_url(args)
        return
    folder = Path(args.output_dir)
    refuse_use(folder, folder.is_file())
    with folder_lock(folder, f"--output_dir {folder}"):
        refuse_use(folder, any(not path.name.startswith(LOCK_NAME) for path in folder.iterdir()))
        export(args, folder)


def export_to_url(args) -> None:
    """Export to a temporary folder, and upload its files."""
    target = S3Folder(args.output_dir)
    with prefix_lock(args.output_dir, f"--output_dir {args.output_dir}"), tempfile.TemporaryDirectory() as folder:
        refuse_use(args.output_dir, any(not name.startswith(LOCK_NAME) for name in patiently(target.names)))
        export(args, folder)
        for path in sorted(Path(folder).iterdir()):
            patiently(lambda path=path: target.upload(path, path.name, {}))


def export(args, folder) -> None:
    gaudi_environment.load_software(use_habana=False)
    from checkpoint import huggingface
    from checkpoint.trained_model import open_trained_model
    from modeling import BertForPreTraining

    trained = open_trained_model(args.checkpoint, args.config_file)
    config, vocabulary = trained.config, trained.full_vocabulary(args.vocab_file, args.do_lower_case)
    phases = [phase for log in args.log for phase in logged_phases(log)]
    model = BertForPreTraining(config)
    trained.load_into(model)
    name = args.model_name or f"BERT with {config.num_hidden_layers} layers of {config.hidden_size}"
    card = model_card(trained, name, model, vocabulary, phases)
    huggingface.write_folder(folder, model, vocabulary.tokens, vocabulary.lower_case, card,
                             not args.skip_variants)
    print(f"{args.output_dir}: {name} from {trained.path}; "
          f"load it with transformers.{huggingface.class_name(model)}.from_pretrained({args.output_dir!r})")


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=cli.path_or_url, required=True,
                        help="ckpt_<step>.pt, a folder of them, of which the newest is taken, or a Hugging "
                             "Face model folder")
    parser.add_argument("--config_file", help="its model config, JSON (default: the one in the checkpoint)")
    parser.add_argument("--vocab_file", type=cli.path_or_url,
                        help="the vocabulary of its data (default: the one in the checkpoint)")
    parser.add_argument("--output_dir", type=cli.path_or_s3, required=True,
                        help="folder (or s3:// prefix) to write; must be new or empty")
    parser.add_argument("--do_lower_case", **cli.BOOLEAN, help="whether the data was lower-cased (default: what the "
                        "checkpoint says; where it does not, whether the vocabulary has capital letters)")
    parser.add_argument("--log", nargs="+", default=[], metavar="LOG",
                        help="logs of the training (--json_summary), for the tables of the model card")
    parser.add_argument("--model_name", type=cli.free_text, help="a name for the model card")
    parser.add_argument("--skip_variants", action="store_true",
                        help="write model.safetensors only, which takes a third of the disk; transformers 5 then "
                        "lists the weights that BertForMaskedLM and BertModel do not use")
    return parser.parse_args(argv)


def refuse_use(folder, in_use: bool) -> None:
    if in_use:
        raise UserError(f"--output_dir {folder}: in use already; name a new or an empty folder")


def logged_phases(log: str) -> list[dict]:
    """The flags and last figures of each phase in a log; a resumed run belongs to its phase."""
    from training.log_versions import read_current_log

    phases: dict[int, dict] = {}
    phase: dict = {}
    for line in read_current_log(log):
        data = line["data"]
        if line["step"] == "PARAMETER":
            number = 2 if data.get("phase2") else 1
            phase = phases.setdefault(number, {"phase": number})
            phase |= {key: data[key] for key in CARD_FLAGS if key in data}
        phase |= {key: data[key] for key in CARD_FIGURES if data.get(key) is not None}
        if "average_loss" in data:
            phase["last step"] = line["step"][1]
    return list(phases.values()) or [phase]


def model_card(trained, name: str, model, vocabulary, phases: list[dict]) -> str:
    """README.md of the folder: the architecture, how it was trained as far as the logs say, and how to load it."""
    from checkpoint.state import INIT_CHECKPOINT

    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    architecture = {
        "Parameters": f"{parameters:,}", "Layers": config.num_hidden_layers, "Hidden size": config.hidden_size,
        "Attention heads": config.num_attention_heads,
        "Vocabulary": f"{config.vocab_size:,} tokens, {'lower-cased' if vocabulary.lower_case else 'cased'}",
        "Longest sequence": config.max_position_embeddings, "Checkpoint": trained.path.name,
        **{title: trained.contents[key] for title, key in (("Phase", "phase"), ("Step of the phase", "step"))
           if type(trained.contents.get(key)) is int}}
    tables = [f"## Phase {phase.pop('phase', '')}, from its log\n\n{markdown_table(phase)}"
              for phase in map(dict, phases)]
    named = (trained.contents.get(INIT_CHECKPOINT), *(phase.get("init_checkpoint") for phase in phases))
    initial = next((name for name in named if name and isinstance(name, str)), None)
    added = config.padded_vocab_size - config.vocab_size
    return CARD.format(name=name, architecture=markdown_table(architecture),
                       **(WITH_NSP if model.has_nsp else WITHOUT_NSP), training="\n\n".join(tables),
                       initial=f", starting from the weights of {initial}" if initial else "",
                       padding=PADDING.format(added=added, padded=config.padded_vocab_size) if added else "")


def markdown_table(values: dict) -> str:
    rows = [f"| {name} | {value:.5g} |" if isinstance(value, float) else f"| {name} | {value} |"
            for name, value in values.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


CARD = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [{tags}]
---

# {name}

BERT (Devlin et al., 2018), pre-trained on {tasks}{initial}.{without}

{architecture}

{training}

## Loading

```python
{loading}
```

The variants hold the weights of model.safetensors that the class uses; without `variant` transformers 5 lists the
unused ones.  For any other class (`AutoModelForSequenceClassification`, …) name the folder alone.
{padding}"""

WITH_NSP = {
    "tags": "bert, masked-lm, next-sentence-prediction",
    "tasks": "masked language modelling and next sentence prediction", "without": "",
    "loading": """from transformers import AutoTokenizer, BertForMaskedLM, BertForPreTraining, BertModel

tokenizer = AutoTokenizer.from_pretrained(folder)
model = BertForPreTraining.from_pretrained(folder)                    # all weights
model = BertForMaskedLM.from_pretrained(folder, variant="masked_lm")  # without the next-sentence head
model = BertModel.from_pretrained(folder, variant="encoder")          # without heads"""}

WITHOUT_NSP = {
    "tags": "bert, masked-lm",
    "tasks": "masked language modelling alone", "without": "  It has no next-sentence head and no pooler.",
    "loading": """from transformers import AutoTokenizer, BertForMaskedLM, BertModel

tokenizer = AutoTokenizer.from_pretrained(folder)
model = BertForMaskedLM.from_pretrained(folder)                                        # all weights
model = BertModel.from_pretrained(folder, variant="encoder", add_pooling_layer=False)  # without the head"""}

PADDING = """
In training the vocabulary was padded to {padded} entries.  The {added} added entries stand for no token and are not in
the model; vocabulary_padding.safetensors holds their rows, so that training can continue from this folder.
"""


if __name__ == "__main__":
    cli.run(main)
