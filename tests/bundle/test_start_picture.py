"""A picture file becomes what a student starts from, by the stated rule; what is no picture is refused."""

import numpy as np
import pytest
from PIL import Image

from edgegen.bundle.start_picture import PIXEL_LIMIT, read_start_picture
from edgegen.errors import EdgegenError, UsageError
from edgegen.students.example_picture import example_picture


def saved(folder, pixels, name="a.png", **options):
    path = folder / name
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, **options)
    return path


def test_the_right_size_is_taken_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3))
    found, remarks = read_start_picture(saved(tmp_path, pixels), 8, 12)
    assert found.shape == (1, 3, 8, 12) and found.dtype == np.float32 and remarks == ()
    assert np.array_equal(np.rint((found[0].transpose(1, 2, 0) + 1) * 127.5), pixels)
    assert found.min() >= -1 and found.max() <= 1


def test_what_is_too_wide_loses_its_sides_alike(tmp_path):
    pixels = np.zeros((10, 40, 3))
    pixels[:, :15], pixels[:, 25:] = (255, 0, 0), (0, 0, 255)  # only the middle ten columns are black
    found, (remark,) = read_start_picture(saved(tmp_path, pixels), 10, 10)
    assert found.max() == -1.0
    assert "40 x 10" in remark and "around its middle, 10 x 10" in remark


def test_small_ones_are_scaled_until_they_cover(tmp_path):
    pixels = np.zeros((4, 8, 3))
    pixels[:, 4:] = 255
    found, _ = read_start_picture(saved(tmp_path, pixels), 16, 32)
    assert found.shape == (1, 3, 16, 32) and (found[..., :12] < -0.9).all() and (found[..., 20:] > 0.9).all()


def test_transparency_is_white_and_grey_has_three_channels(tmp_path):
    clear = np.zeros((6, 6, 4))
    found, _ = read_start_picture(saved(tmp_path, clear), 6, 6)
    assert (found == 1.0).all()
    grey, _ = read_start_picture(saved(tmp_path, np.full((6, 6), 51), "b.png"), 6, 6)
    assert np.allclose(grey, 51 / 127.5 - 1) and grey.shape == (1, 3, 6, 6)


def test_it_is_turned_as_the_camera_says(tmp_path):
    pixels = np.zeros((16, 8, 3))
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is on the file's right side
    found, _ = read_start_picture(saved(tmp_path, pixels, "a.jpg", exif=exif, quality=100), 8, 16)
    assert (found[..., 9:] > 0.9).all() and (found[..., :7] < -0.9).all()


@pytest.mark.parametrize("content", [b"", b"no picture", b"%PDF-1.4", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(EdgegenError) as caught:
        read_start_picture(tmp_path / "a.png", 8, 8)
    assert "a.png" in caught.value.message and caught.value.hint


def test_what_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_start_picture(tmp_path, 8, 8)


def test_a_picture_that_would_fill_the_memory(tmp_path):
    side = int(PIXEL_LIMIT**0.5) + 2
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(EdgegenError, match="pixels"):
        read_start_picture(path, 8, 8)


def test_example_pictures_are_drawn_from_their_name():
    first, again, other = (example_picture(name, 20, 30) for name in ("a", "a", "b"))
    assert first.shape == (3, 20, 30) and first.dtype == np.float32
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.min() >= -1 and first.max() <= 1 and first.std() > 0.1
    assert not example_picture("", 20, 30).any()
    # Written down: bundles of two machines hold the same pictures.
    assert round(float(example_picture("example picture 1", 64, 64).sum()), 1) == 2441.7
