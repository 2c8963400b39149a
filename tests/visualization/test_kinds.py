"""Objects with similar codes are drawn in one row."""

import numpy as np

from air.visualization.drawing import tile
from air.visualization.kinds import EXAMPLES, SIDE, draw_kinds, group_codes


def test_codes_fall_into_the_groups_from_which_they_were_drawn() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1, 2], [40, 10, 25])
    codes = 20 * np.eye(3)[kinds] + rng.normal(size=(75, 3))
    groups = group_codes(codes, 3)
    assert [set(kinds[rows]) for rows in groups] == [{0}, {2}, {1}]
    for rows in groups:
        distances = np.linalg.norm(codes[rows] - codes[rows].mean(0), axis=1)
        assert (np.diff(distances) >= 0).all()
    assert sorted(np.concatenate(group_codes(codes))) == list(range(75))


def test_few_or_equal_codes_are_grouped_too() -> None:
    assert [rows.tolist() for rows in group_codes(np.ones((1, 4)))] == [[0]]
    assert sum(map(len, group_codes(np.ones((9, 4))))) == 9


def test_a_kind_is_a_row_of_its_pictures() -> None:
    crops = [np.full((3, 5 + k, 4), 100 * (k % 2), np.uint8) for k in range(6)]
    sheet = draw_kinds(crops, np.array([[0.0], [50.0]] * 3) + np.arange(6)[:, None] / 10)
    cells = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    assert sheet.shape[1] == tile(cells.repeat(1 + EXAMPLES, 0), 1 + EXAMPLES).shape[1]
    assert (sheet == 100).any()
