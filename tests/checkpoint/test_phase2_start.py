"""Where phase 2 starts without --phase1_end_step: what the checkpoints in the folder say."""

import pytest

from checkpoint.file import write_file
from checkpoint.folder import checkpoint_path
from checkpoint.resume import last_step_of_phase1
from common.errors import UserError


def phase1(step: int, planned: int) -> dict:
    return {"step": step, "phase": 1, "phase_steps": planned}


def write(folder, checkpoints: dict[int, dict]) -> None:
    for number, contents in checkpoints.items():
        write_file(checkpoint_path(folder, number), {"model": {}, **contents})


@pytest.mark.parametrize("checkpoints, last", [
    ({}, 7038),  # of the published recipe
    ({6: {}}, 6),  # of another program
    ({6: {"step": 6, "phase": 1}}, 6),  # of an earlier version
    ({4: phase1(4, 6), 6: phase1(6, 6)}, 6),
    ({6: phase1(6, 6), 9: phase1(9, 9)}, 9),  # prolonged
    ({6: phase1(6, 6), 8: {"step": 2, "phase": 2}, 9: {"step": 3, "phase": 2}}, 6),
    ({9: {"step": 3, "phase": 2}}, 6),
    ({7000: {}, 7038: {}}, 7038),
    ({7038: phase1(7038, 7038), 7040: {"step": 2, "phase": 2}}, 7038)])
def test_the_end_of_phase_1_is_found_where_it_is_unambiguous(tmp_path, checkpoints, last):
    write(tmp_path, checkpoints)
    assert last_step_of_phase1(tmp_path, warn=pytest.fail) == last


@pytest.mark.parametrize("checkpoints, said", [
    ({4: {}, 6: {}}, "which of ckpt_4.pt, ckpt_6.pt ended phase 1?; --phase2 continues from ckpt_N.pt"),
    ({2: {"step": 2, "phase": 1}, 4: {}, 6: {}}, "which of ckpt_2.pt, ckpt_4.pt, ckpt_6.pt ended phase 1?"),
    ({4: phase1(4, 6)}, "phase 1 is not finished: ckpt_4.pt is step 4 of 6; --phase2 continues"),
    ({6: {"step": "six"}}, "ckpt_6.pt: step is 'six', not a whole number")])
def test_where_it_is_not_one_line_says_which_there_are(tmp_path, checkpoints, said):
    write(tmp_path, checkpoints)
    with pytest.raises(UserError) as caught:
        last_step_of_phase1(tmp_path, warn=pytest.fail)
    assert said in str(caught.value)
