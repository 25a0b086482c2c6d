"""What can be predicted without context: the line below which a masked language model has learned something.

A context-free model knows how often each token occurs in the training set, p(v) = (count + 1) / (all counts + V), and
which token it is shown in place of the one to predict.  With MASKED, REPLACED and KEPT the shares of predicted tokens
that become [MASK], a random word of R, or stay (Devlin et al. 2018, section 3.1), the best it can say is

    shown [MASK]:      P(y) = p(y)
    shown a word x:    P(the word was kept) = KEPT·p(x) / (KEPT·p(x) + REPLACED/R) =: k(x), by Bayes' rule,
                       P(y) = k(x)·[y = x] + (1 − k(x))·p(y)

Its loss and accuracy on the held-out tokens are the line.  The cruder rule "a shown word is right half of the time"
gives 0.8·H + 0.1·ln 2 + 0.1·(H + ln 2), with H the cross entropy of the held-out tokens under p, a little more.
"""

from dataclasses import dataclass

import torch

from data.masking import MASKED, REPLACED

KEPT = 1.0 - MASKED - REPLACED
SPECIAL_TOKENS = 5  # never put in place of a token


@dataclass(frozen=True)
class ContextFreeModel:
    """The best predictions from frequencies alone.  Tables on one device, by token id."""

    log_share: torch.Tensor  # log p(v)  (V,)
    log_kept: torch.Tensor  # log k(x)  (V,)
    log_replaced: torch.Tensor  # log(1 − k(x))  (V,)
    most_frequent: torch.Tensor  # a token id, scalar

    @classmethod
    def from_counts(cls, counts, torch_device="cpu") -> "ContextFreeModel":
        """From the counts of the training tokens, (V,), an array or a tensor of whole numbers."""
        counts = torch.as_tensor(counts, dtype=torch.float64)
        share = (counts + 1.0) / (counts.sum() + len(counts))
        kept, replaced = KEPT * share, REPLACED / max(len(counts) - SPECIAL_TOKENS, 1)
        tables = (share.log(), (kept / (kept + replaced)).log(), (replaced / (kept + replaced)).log())
        return cls(*(table.float().to(torch_device) for table in tables), share.argmax().to(torch_device))

    def losses(self, shown: torch.Tensor, labels: torch.Tensor, is_mask: torch.Tensor) -> torch.Tensor:
        """The cross entropy of each label, nats; `is_mask`: 1.0 where [MASK] is shown, else 0.0.  (K,) each"""
        log_share = self.log_share[labels]
        other = self.log_replaced[shown] + log_share
        same = torch.logaddexp(self.log_kept[shown], other)
        is_same = (shown == labels).float()
        of_word = is_same * same + (1.0 - is_same) * other
        return -(is_mask * log_share + (1.0 - is_mask) * of_word)

    def predictions(self, shown: torch.Tensor, is_mask: torch.Tensor) -> torch.Tensor:
        """The likeliest token at each place.  (K,) → (K,)"""
        other = self.log_replaced[shown] + self.log_share[self.most_frequent]
        trusts_word = (self.log_kept[shown] > other).float() * (1.0 - is_mask)
        chosen = trusts_word * shown.float() + (1.0 - trusts_word) * self.most_frequent.float()
        return chosen.round().to(shown.dtype)
