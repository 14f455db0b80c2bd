import numpy as np
import pytest
from PIL import Image

from tests.pictures import encoded, png
from vlm_sft.common.errors import DataError
from vlm_sft.data.images import check_image, decode_rgb
from vlm_sft.data.sample import ImageRef


def test_transparency_is_flattened_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    grey = Image.new("LA", (4, 4), (0, 0))
    assert decode_rgb(encoded(clear), "x").getpixel((0, 0)) == (255, 255, 255)
    assert decode_rgb(encoded(half), "x").getpixel((0, 0)) == (127, 127, 127)
    assert decode_rgb(encoded(palette), "x").getpixel((0, 0)) == (255, 0, 0)
    assert decode_rgb(encoded(palette, transparency=1), "x").getpixel((0, 0)) == (255, 255, 255)
    assert decode_rgb(encoded(grey), "x").getpixel((0, 0)) == (255, 255, 255)


def test_an_opaque_alpha_channel_changes_no_colour():
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    opaque = np.dstack([colours, np.full((16, 16), 255, dtype=np.uint8)])
    assert (np.asarray(decode_rgb(encoded(Image.fromarray(opaque)), "x")) == colours).all()
    opaque[3, 5, 3] = 0
    colours[3, 5] = 255
    assert (np.asarray(decode_rgb(encoded(Image.fromarray(opaque)), "x")) == colours).all()


def test_modes_become_rgb():
    assert decode_rgb(encoded(Image.new("L", (3, 2), 77)), "x").getpixel((0, 0)) == (77, 77, 77)
    assert decode_rgb(encoded(Image.new("1", (3, 2), 1)), "x").getpixel((0, 0)) == (255, 255, 255)
    cmyk = decode_rgb(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), "x")
    assert cmyk.mode == "RGB" and cmyk.getpixel((4, 4))[0] > 240 and cmyk.getpixel((4, 4))[1] < 15


def test_sixteen_bit_is_scaled_not_clipped():
    ramp = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [decode_rgb(encoded(ramp), "x").getpixel((n, 0))[0] for n in range(3)] == [0, 128, 255]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [decode_rgb(encoded(floats, "TIFF"), "x").getpixel((n, 0))[0] for n in range(3)] == [0, 128, 255]


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    turned = decode_rgb(encoded(image, "JPEG", exif=exif.tobytes(), quality=95), "x")
    assert turned.size == (10, 20) and turned.getpixel((5, 3))[0] > 240 and turned.getpixel((5, 16))[0] < 15


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(data, "x").getpixel((0, 0)) == (255, 0, 0)


def test_phone_pictures_with_several_frames():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode_rgb(data, "x").getpixel((8, 8))[0] > 240


def test_check_image_fills_the_size_and_decodes_once():
    reads = []

    def load() -> bytes:
        reads.append(1)
        return png(size=(31, 17))

    checked = check_image(ImageRef("k", "s", load))
    assert (checked.width, checked.height, checked.key) == (31, 17, "k")
    assert check_image(checked) is checked and len(reads) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_truncated_is_refused(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, kind)
    assert decode_rgb(whole, "x").size == (64, 64)
    with pytest.raises(DataError, match="pic.x"):
        decode_rgb(whole[: int(len(whole) * share)], "pic.x")


@pytest.mark.parametrize(
    "data, part",
    [
        (b"", "0 bytes"),
        (b"hello", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded|not an image"),
    ],
)
def test_what_is_no_picture_is_refused(data, part):
    with pytest.raises(DataError, match=part):
        decode_rgb(data, "pic")


def test_decompression_bombs_are_refused_before_decoding():
    bomb = bytearray(png(size=(8, 8)))
    bomb[16:24] = (12_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    crc = __import__("zlib").crc32(bytes(bomb[12:29]))
    bomb[29:33] = crc.to_bytes(4, "big")
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DataError, match="too large.*12000 x 10000"):
        decode_rgb(bytes(bomb), "bomb.png")
    bomb[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    bomb[29:33] = __import__("zlib").crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(DataError, match="too large"):
        decode_rgb(bytes(bomb), "bomb.png")


def test_every_exif_orientation_is_shown_upright():
    upright = Image.new("RGB", (20, 10), "black")
    upright.paste("red", (0, 0, 5, 5))  # the corner that must be at the top left again
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        seen = decode_rgb(encoded(image, "PNG", exif=exif.tobytes()), "x")
        assert seen.size == (20, 10) and seen.tobytes() == upright.tobytes(), orientation


def test_animations_of_other_kinds_show_their_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("lime", "blue")]
    for kind, how in (("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how)
        assert decode_rgb(data, kind).getpixel((4, 4)) == (0, 255, 0), kind


def test_damaged_bytes_never_raise_anything_else():
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    sound = [encoded(noise, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]
    refused = 0
    for number in range(700):
        data = bytearray(sound[number % len(sound)])
        for _ in range(1 + number % 8):
            data[random.integers(len(data))] = random.integers(256)
        try:
            assert decode_rgb(bytes(data[: len(data) - number % 5]), "x").mode == "RGB"
        except DataError as error:
            refused += 1
            assert error.what.startswith("x: ") and error.fix
    assert refused > 100
