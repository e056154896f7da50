import pytest

from tests.kill import CASES, survive


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_and_restarted_command_equals_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    num_kills = 8 if name == "train" else 2
    seen = survive(CASES[name], num_kills, tmp_path, seed=1)
    assert sum(seen["kills"].values()) >= num_kills
    assert min(seen["kills"].values()) > 0
    assert seen["finished"] > 0
