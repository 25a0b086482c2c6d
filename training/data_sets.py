"""The training and held-out sets of a run, checked against its flags, its config and one another."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from common.bert_config import BertConfig
from common.errors import UserError
from data.dataloader import average_sequences_per_row, check_first_rows
from data.mixture import Mixture, Source, parse_sources
from data.origin import check_vocabulary, held_from_training, texts_of, vocabulary_of
from data.packed_totals import difference_from_metadata
from data.shards import Shard, find_readable_shards, find_shards, full_vocabulary
from data.token_counts import stored_counts
from data.vocabulary import Vocabulary, check_same_vocabulary, vocabulary_in

SMALLEST_USE = 0.9  # share of vocab_size that the highest token id of a data set should reach


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """What --input_dir names: one set, or a mixture of several."""

    sources: list[Source]
    shards_of_sources: list[list[Shard]]
    mixture: Mixture
    sequences_per_row: float  # on average; in a mixture by the shares of its sources

    @property
    def shards(self) -> list[Shard]:
        return [shard for shards in self.shards_of_sources for shard in shards]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def describe(self) -> list[str]:
        """A line for each source of a mixture."""
        if len(self.sources) == 1:
            return []
        return [f"  {source.name}: {part / self.mixture.period:.1%} of the micro-batches, "
                f"{sum(shard.rows for shard in shards):,} rows"
                for source, part, shards in zip(self.sources, self.mixture.parts, self.shards_of_sources, strict=True)]


def find_training_set(args, reader, warn: Callable[[str], None]) -> TrainingSet:
    """The sets of --input_dir, checked against the flags and one another.

    Lengths that no flag gives are set to those of the shards.
    """
    sources = parse_sources(args.input_dir)
    mixture = Mixture.of(sources)
    found = [source_shards(args, source, reader, warn) for source in sources]
    for other in found[1:]:
        if other[0].description != found[0][0].description:
            raise UserError(f"--input_dir: the shards of {found[0][0].source} are {found[0][0].description}, but those "
                            f"of {other[0].source} {other[0].description}: a mixture is of one form")
        check_same_vocabulary(vocabulary_of(found[0])[0], f"--input_dir {sources[0].folder}", vocabulary_of(other)[0],
                              f"--input_dir {other[0].path.parent}")
    check_form(args, found[0][0], warn)
    averages = [average_sequences_per_row(shards, reader, args.skip_bad_shards) for shards in found]
    return TrainingSet(sources=sources, shards_of_sources=found, mixture=mixture,
                       sequences_per_row=float(np.average(averages, weights=mixture.parts)))


def source_shards(args, source: Source, reader, warn) -> list[Shard]:
    """The shards of a source that can be read."""
    if args.skip_bad_shards:
        found, unreadable = find_readable_shards(source.folder, reader=reader, most_cached=cache_bytes(args))
        for fault in unreadable:
            warn(f"skipped from the start: {fault}")
    else:
        found = find_shards(source.folder, reader=reader, most_cached=cache_bytes(args))
    difference = difference_from_metadata(found)
    if difference:
        warn(f"{difference}; the training uses those that are there")
    if args.whole_word_mask:
        found = [shard.with_whole_words_masked() for shard in found]
    return [replace(shard, source=source.name) for shard in found]


def cache_bytes(args) -> int:
    """What the copies of remote shards may take, 0 where no flag says it."""
    return int((args.shard_cache_gb or 0) * 1e9)


def check_form(args, shard: Shard, warn) -> None:
    """Check the flags that say what the shards hold, by one of them."""
    set_lengths(args, shard)
    if args.enable_packed_data_mode is not None:
        warn("--enable_packed_data_mode is deprecated: the shards decide")
        if args.enable_packed_data_mode != shard.packed:
            raise UserError(f"--enable_packed_data_mode {args.enable_packed_data_mode}, but the shards in "
                            f"{shard.path.parent} are {'packed' if shard.packed else 'not packed'}")
    if args.avg_seq_per_pack is not None:
        warn("--avg_seq_per_pack is deprecated and has no effect: the data decides")


def set_lengths(args, shard: Shard) -> None:
    """Check --max_seq_length and --max_predictions_per_seq against a shard, which gives them where they are missing."""
    predictions = shard.prediction_slots - (shard.max_sequences if shard.packed else 0)
    if args.max_seq_length not in (None, shard.sequence_length):
        raise UserError(f"{shard.path}: its rows have {shard.sequence_length} tokens, "
                        f"but --max_seq_length is {args.max_seq_length}")
    if args.max_predictions_per_seq is not None and predictions > args.max_predictions_per_seq:
        raise UserError(f"{shard.path}: made with {predictions} predictions a sequence, "
                        f"but --max_predictions_per_seq is {args.max_predictions_per_seq}")
    args.max_seq_length = shard.sequence_length
    args.max_predictions_per_seq = args.max_predictions_per_seq or predictions


def training_token_counts(args, config: BertConfig, training_set: TrainingSet, reader, warn) -> np.ndarray:
    """How often each token occurs in the training set, which is checked against the config; in a mixture, by the shares
    of its sources.  (vocab_size,) int64"""
    check_length("--max_seq_length", args.max_seq_length, config)
    counts = [counted_tokens(args, source, shards, config, reader, warn)
              for source, shards in zip(training_set.sources, training_set.shards_of_sources, strict=True)]
    return mixed_counts(counts, training_set.mixture)


def counted_tokens(args, source: Source, shards: list[Shard], config: BertConfig, reader, warn) -> np.ndarray:
    """How often each token occurs in a source, after a check of its first rows and of its vocabulary."""
    vocabulary = check_vocabulary(shards, config.vocab_size)
    counts = stored_counts(shards, config.vocab_size)
    if counts is None or not shards[0].remote:  # a remote set is checked shard by shard, as they are used
        in_first_rows = check_first_rows(shards, config.vocab_size, reader, args.skip_bad_shards)
        counts = in_first_rows if counts is None else counts
    used = len(counts.nonzero()[0]) and int(counts.nonzero()[0][-1]) + 1
    if not vocabulary and used < SMALLEST_USE * config.vocab_size:
        warn(f"--input_dir {source.folder}: no token id above {used - 1} in it, but vocab_size in "
             f"{args.config_file or 'the config'} is {config.vocab_size}: was the data made with another vocabulary?")
    return counts


def mixed_counts(counts: list[np.ndarray], mixture: Mixture) -> np.ndarray:
    """The counts of a mixture: those of each source, scaled to its share of as many tokens as the largest has."""
    if len(counts) == 1:
        return counts[0]
    most = max(own.sum() for own in counts)
    return sum(own * (part / mixture.period * most / max(own.sum(), 1))
               for own, part in zip(counts, mixture.parts, strict=True)).round().astype(np.int64)


def training_vocabulary(input_dir, shards: list[Shard], resume_point, reader) -> Vocabulary | None:
    """The vocabulary of the run, with its tokens where they are known: that of the shards, else the checkpoint's.

    UserError where the two differ; from an --init_checkpoint a run may go on with words in its unused places.
    """
    known, path = vocabulary_in(resume_point.contents or {}, resume_point.path), resume_point.path
    _, shard = vocabulary_of(shards)
    if not shard:
        return known
    vocabulary = full_vocabulary(shard, reader)
    check_same_vocabulary(vocabulary, f"--input_dir {input_dir}", known, str(path),
                          may_extend=path == resume_point.init_checkpoint)
    return vocabulary


def held_out_shards(args, config: BertConfig, training: list[Shard], vocabulary: Vocabulary | None,
                    reader) -> list[Shard] | None:
    """The shards of --eval_dir; UserError where they do not fit the model or hold what it is trained on."""
    if not args.eval_dir:
        return None
    found = find_shards(args.eval_dir, "test", "--eval_dir", reader, cache_bytes(args))
    if found[0].objective.nsp != training[0].objective.nsp:
        without, others = ("--eval_dir", "--input_dir") if training[0].objective.nsp else ("--input_dir", "--eval_dir")
        raise UserError(f"the shards of {without} {getattr(args, without[2:])} were made with --no_nsp, those of "
                        f"{others} {getattr(args, others[2:])} were not")
    check_length(f"{found[0].path}: the row length", found[0].sequence_length, config)
    check_same_vocabulary(check_vocabulary(found, config.vocab_size), f"--eval_dir {args.eval_dir}", vocabulary,
                          f"--input_dir {args.input_dir}")
    trained = held_from_training(found, texts_of(training))
    if trained:
        raise UserError(f"--eval_dir {args.eval_dir}: {trained.name} is, or was made from, what --input_dir "
                        f"{args.input_dir} trains on: hold out other text (evaluate.py gives the loss on this)")
    return found


def check_length(what: str, length: int, config: BertConfig) -> None:
    if length > config.max_position_embeddings:
        raise UserError(f"{what} {length} is above max_position_embeddings {config.max_position_embeddings}")
