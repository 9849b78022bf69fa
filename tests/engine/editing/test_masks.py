"""From a mask over pixels to the cells that are generated."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from engine.editing.masks import border_hole, enlarge, hole_of_mask, polygon_mask, random_hole, rectangle_mask
from util.crop import center_crop_arr
from util.errors import UserError


def test_a_cell_with_any_masked_pixel_is_generated() -> None:
    """Of a picture as large as the model's, cell by cell; a grey pixel counts from 128 on."""
    rng = np.random.default_rng(0)
    mask = (rng.random((24, 24)) < 0.03).astype(np.uint8) * 128
    expected = np.array([[mask[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].any() for c in range(6)] for r in range(6)])
    assert 0 < expected.sum() < 36
    assert (hole_of_mask(Image.fromarray(mask), (24, 24), 24, 6) == expected).all()
    assert not hole_of_mask(Image.fromarray(mask // 2 + 60), (24, 24), 24, 6).any()


def test_masks_are_cropped_like_their_pictures() -> None:
    """A square of a wide picture's middle: cells beyond it do not exist, and its size is the picture's."""
    mask = rectangle_mask((96, 48), (24, 0, 36, 48))
    hole = hole_of_mask(mask, (96, 48), 24, 6)
    assert (hole == [[True, True, False, False, False, False]] * 6).all()
    assert not hole_of_mask(rectangle_mask((96, 48), (0, 0, 20, 48)), (96, 48), 24, 6).any()
    with pytest.raises(UserError, match="the mask has 96×48 pixels, but the picture 48×96"):
        hole_of_mask(mask, (48, 96), 24, 6)


@pytest.mark.parametrize("size", [(24, 24), (192, 192), (101, 67), (50, 331), (47, 48)])
def test_a_cell_is_where_the_crop_shows_it(size: tuple[int, int]) -> None:
    """For boxes anywhere in pictures of any size: a cell is masked as far as the cropped mask can tell."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        left, right = sorted(rng.choice(size[0] + 1, 2, replace=False))
        top, bottom = sorted(rng.choice(size[1] + 1, 2, replace=False))
        mask = rectangle_mask(size, (left, top, right, bottom))
        hole = hole_of_mask(mask, size, 24, 6)
        shown = np.asarray(center_crop_arr(mask, 24)).reshape(6, 4, 6, 4).max(axis=(1, 3))
        assert hole[shown >= 192].all()
        assert not hole[shown == 0].any() or min(right - left, bottom - top) < min(size) / 24


def test_a_stroke_thinner_than_a_pixel_of_the_model_counts() -> None:
    mask = np.zeros((192, 192), np.uint8)
    mask[:, 32] = 255
    assert (hole_of_mask(Image.fromarray(mask), (192, 192), 24, 6) == [[False, True, *[False] * 4]] * 6).all()


def test_boxes_and_polygons() -> None:
    inside = np.asarray(rectangle_mask((10, 8), (2, 1, 6, 4))) == 255
    assert inside[1:4, 2:6].all()
    assert inside.sum() == 12
    assert (np.asarray(rectangle_mask((10, 8), (2, 1, 6, 4), outside=True)) == 255 * ~inside).all()
    assert np.asarray(rectangle_mask((10, 8), (2.2, 1, 2.6, 1.5))).nonzero() == ([1], [2])
    triangle = np.asarray(polygon_mask((9, 9), [(0, 0), (8, 0), (0, 8)])) == 255
    assert triangle[0].all()
    assert triangle[:, 0].all()
    assert not triangle[8, 8]
    for box in ((6, 1, 2, 4), (2, 1, 11, 4), (-1, 1, 6, 4), (2, 4, 6, 4), (float("nan"), 0, 1, 1)):
        with pytest.raises(UserError, match="must be left,top,right,bottom within the picture's 10×8 pixels"):
            rectangle_mask((10, 8), box)
    with pytest.raises(UserError, match="three corners or more, got 2"):
        polygon_mask((9, 9), [(0, 0), (1, 1)])


def test_shares_that_are_kept() -> None:
    assert (~random_hole(16, 0.25, seed=1)).sum() == 64
    assert (random_hole(16, 0.25, seed=1) == random_hole(16, 0.25, seed=1)).all()
    assert (random_hole(16, 0.25, seed=1) != random_hole(16, 0.25, seed=2)).any()
    kept = ~border_hole(16, 0.25)
    assert kept[4:12, 4:12].all()
    assert kept.sum() == 64
    for share, count in ((0.0, 0), (1.0, 36)):
        assert (~random_hole(6, share, 0)).sum() == (~border_hole(6, share)).sum() == count
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="the share to keep"):
            random_hole(6, share, 0)
    assert (enlarge(np.array([[True, False]]), 2) == [[1, 1, 0, 0], [1, 1, 0, 0]]).all()
