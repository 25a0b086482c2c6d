"""Samples of full sentences, without a second segment, for --no_nsp.  No torch here.

Sentences are taken one after the other as long as they fit, also across the ends of documents, where a [SEP] stands
between them (FULL-SENTENCES of Liu et al. 2019, "RoBERTa", arXiv 1907.11692, section 4.2).  A sentence that is longer
than a sample is cut, so that every token of the text is in exactly one sample of each pass.

Shapes: B rows, S = max_seq_length.
"""

from bisect import bisect_right

import numpy as np

SPECIALS = 2  # [CLS] … [SEP]


class FullSentences:
    """The samples of a block of text: [CLS] sentences [SEP], with a [SEP] between documents.

    lengths: their tokens, special ones included, (n,); used_tokens: how many tokens of the text are in one.
    """

    def __init__(self, documents, options, special_ids):
        self.special_ids = special_ids
        self.ids, begins, ends = with_separators(documents, special_ids[3])
        self.spans = np.tile(plan_spans(begins, ends, options.max_seq_length - SPECIALS), (options.dupe_factor, 1))
        self.lengths = self.spans[:, 1] - self.spans[:, 0] + SPECIALS
        self.used_tokens = len(documents.ids)

    def rows(self, numbers: np.ndarray, sequence_length: int) -> dict[str, np.ndarray]:
        """The rows of some samples, without masks."""
        pad, _, cls, sep, _ = self.special_ids
        begin, end = self.spans[numbers].T[:, :, None]  # (B, 1) each
        column = np.arange(sequence_length)[None, :]  # (1, S)
        last = end - begin + 1  # the position of the last [SEP]
        input_ids = self.ids.take(begin - 1 + column, mode="clip")  # (B, S)
        input_ids[:, 0] = cls
        input_ids[column == last] = sep
        input_ids[column > last] = pad
        return {"input_ids": input_ids, "input_mask": (column <= last).astype(np.int8),
                "segment_ids": np.zeros(input_ids.shape, np.int8)}


def with_separators(documents, separator: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The token ids of all Documents (samples.py) with a separator between two, and where each sentence begins and
    ends in them.  (tokens + documents − 1,), (sentences,), (sentences,)
    """
    bounds, first = documents.bounds, documents.first
    ids = np.insert(documents.ids, bounds[first[1:-1]], separator)
    before = np.repeat(np.arange(len(first) - 1), np.diff(first))  # separators before each sentence
    return ids, bounds[:-1] + before, bounds[1:] + before


def plan_spans(begins: np.ndarray, ends: np.ndarray, longest: int) -> np.ndarray:
    """Where samples of at most `longest` tokens begin and end, (n, 2).

    Each holds whole sentences, or as much as fits of one that is longer.

    >>> plan_spans(np.array([0, 3, 6]), np.array([3, 5, 13]), 5).tolist()
    [[0, 5], [6, 11], [11, 13]]
    """
    begins, ends, spans = begins.tolist(), ends.tolist(), []
    sentence, begin = 0, 0
    while sentence < len(ends):
        behind = bisect_right(ends, begin + longest, sentence)  # the first sentence that does not end in the sample
        end = ends[behind - 1] if behind > sentence else begin + longest
        spans.append((begin, end))
        begin = begins[behind] if behind > sentence and behind < len(ends) else end
        sentence = behind
    return np.array(spans, np.int64).reshape(-1, 2)
