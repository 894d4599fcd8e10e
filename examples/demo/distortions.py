"""The 25 distortions of KADID-10k at their five levels, on uint8 RGB images.

Source: Lin, Hosu and Saupe, "KADID-10k: A Large-scale Artificially Distorted IQA Database" (QoMEX 2019); the level
tables are those of its published generator. KADID's images are 512 x 384. `scale` fits what is measured in pixels
(blur widths, shifts, patches) to images of another size; what acts on single pixels (noise, codecs, pixelation,
quantisation) has no meaning below one pixel and stays as it is.

Where the original needs something that scientific Python lacks we say so at the function: 15 (DnCNN) and 22 (Otsu
thresholds of many classes) are close relatives, not the same operation.
"""

import io
import warnings

import numpy as np
from PIL import Image
from scipy import interpolate, ndimage


try:
    from skimage import color, restoration, util
except ImportError as error:
    raise ImportError(f"KADID-10k's distortions need scikit-image: pip install scikit-image ({error})") from error


# KADID's number is the position, from 1. Four entries change nothing: KADID had people rate unchanged images, too.
LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian_blur": (0.1, 0.5, 1, 2, 5),  # sigma, pixels
    "lens_blur": (1, 2, 4, 6, 8),  # radius, pixels
    "motion_blur": (1, 2, 4, 6, 10),  # length, pixels
    "color_diffusion": (1, 3, 6, 8, 12),
    "color_shift": (1, 3, 6, 8, 12),  # pixels
    "color_quantization": (64, 48, 32, 16, 8),  # colours
    "color_saturation_hsv": (0.4, 0.2, 0.1, 0, -0.4),  # factor
    "color_saturation_lab": (1, 2, 3, 6, 9),  # factor
    "jpeg2000": (16, 32, 45, 120, 170),  # compression ratio
    "jpeg": (43, 36, 24, 7, 4),  # quality
    "white_noise": (0.001, 0.002, 0.003, 0.005, 0.01),  # variance
    "white_noise_ycbcr": (0.0001, 0.0005, 0.001, 0.002, 0.003),  # variance
    "impulse_noise": (0.001, 0.005, 0.01, 0.02, 0.03),  # density
    "multiplicative_noise": (0.001, 0.005, 0.01, 0.02, 0.05),  # variance
    "denoise": (0.001, 0.002, 0.003, 0.005, 0.01),  # variance of the noise that is added, then removed
    "brighten": (0.1, 0.2, 0.4, 0.7, 1.1),
    "darken": (0.05, 0.1, 0.2, 0.4, 0.8),
    "mean_shift": (0.15, 0.08, 0, -0.08, -0.15),
    "jitter": (0.05, 0.1, 0.2, 0.5, 1),  # standard deviation, pixels
    "non_eccentricity_patch": (20, 40, 60, 80, 100),  # patches
    "pixelate": (0.01, 0.05, 0.1, 0.2, 0.5),
    "quantization": (20, 16, 13, 10, 7),  # values per channel
    "color_block": (2, 4, 6, 8, 10),  # blocks
    "high_sharpen": (1, 2, 3, 6, 12),
    "contrast_change": (0.3, 0.15, 0, -0.4, -0.6),
}
DISTORTIONS: tuple[str, ...] = tuple(LEVELS)
UNCHANGED = (("gaussian_blur", 1), ("motion_blur", 1), ("color_saturation_lab", 1), ("mean_shift", 3))


def distort(
    image: np.ndarray, distortion: int | str, level: int, rng: np.random.Generator, scale: float = 1.0
) -> np.ndarray:
    """One distortion of KADID-10k at one of its five levels.

    Args:
        image: (height, width, 3) uint8 RGB; not modified.
        distortion: KADID's number 1..25, or a name in `DISTORTIONS`.
        level: 1 (mildest) to 5. `mean_shift` and `contrast_change` are mildest at 3, where they change sign.
        rng: source of every random choice: equal states give equal images.
        scale: pixels of this image per pixel of a 512 x 384 image of the same scene, e.g. `height / 384`.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ValueError: wrong shape or dtype, unknown distortion or level, scale not positive.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"Expected an RGB image as a uint8 array (height, width, 3), found {found}.")
    if isinstance(distortion, (int, np.integer)) and 1 <= distortion <= len(DISTORTIONS):
        distortion = DISTORTIONS[distortion - 1]
    if distortion not in LEVELS:
        raise ValueError(f"Expected a distortion 1..25 or one of {', '.join(DISTORTIONS)}; found {distortion!r}.")
    if level not in (1, 2, 3, 4, 5):
        raise ValueError(f"Expected a level 1..5, found {level!r}.")
    if not scale > 0:
        raise ValueError(f"Expected a positive scale, found {scale}.")
    x = image.astype(np.float64) / 255
    out = _FUNCTIONS[distortion](x, LEVELS[distortion][level - 1], rng, scale)
    return np.rint(np.clip(out, 0, 1) * 255).astype(np.uint8)


# Below: x (height, width, 3) in [0, 1] -> the same, possibly beyond [0, 1].


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0)[: x.ndim], mode="nearest")


def _convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return ndimage.convolve(x, kernel[..., None] / kernel.sum(), mode="nearest")


def _gaussian_blur(x, sigma, rng, scale):
    return _blur(x, sigma * scale)


def _lens_blur(x, radius, rng, scale):
    """Disk kernel; every weight is the part of its pixel that the disk covers."""
    radius, fine = radius * scale, 16
    half = int(np.ceil(radius + 0.5)) - 1
    offsets = (np.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5
    inside = np.hypot(*np.meshgrid(offsets, offsets)) <= radius
    kernel = inside.reshape(2 * half + 1, fine, 2 * half + 1, fine).mean((1, 3))
    return _convolve(x, kernel)


def _motion_blur(x, length, rng, scale):
    """A line with linear falloff of one pixel around it; a length of one pixel is no motion."""
    half, angle = (length - 1) / 2 * scale, rng.uniform(0, np.pi)
    size = int(np.ceil(half)) + 1
    v, u = np.mgrid[-size : size + 1, -size : size + 1]
    along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    distance = np.hypot(across, np.maximum(np.abs(along) - half, 0))
    return _convolve(x, np.maximum(1 - distance, 0))


def _color_diffusion(x, amount, rng, scale):
    lab = color.rgb2lab(x)
    lab[..., 1:] = amount * _blur(lab[..., 1:], (1.5 * amount + 2) * scale)
    return _lab2rgb(lab)


def _color_shift(x, amount, rng, scale):
    """The green channel moves in a random direction, where the image has edges."""
    rows, columns = np.gradient(color.rgb2gray(x))
    edges = _blur(np.hypot(rows, columns), 4 * scale)
    low, high = np.percentile(edges, (1, 99))
    edges = np.clip((edges - low) / max(high - low, 1e-12), 0, 1)
    angle = rng.uniform(0, np.pi / 2)
    shift = (amount * scale * np.sin(angle), amount * scale * np.cos(angle))
    moved = ndimage.shift(x[..., 1], shift, order=1, mode="nearest")
    out = x.copy()
    out[..., 1] = edges * moved + (1 - edges) * x[..., 1]
    return out


def _color_quantization(x, colors, rng, scale):
    """Indexed image with error diffusion; Pillow's median cut stands for MATLAB's minimum variance."""
    image = Image.fromarray(_uint8(x))
    palette = image.quantize(colors, method=Image.Quantize.MEDIANCUT)
    dithered = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    return np.asarray(dithered.convert("RGB")) / 255


def _color_saturation_hsv(x, factor, rng, scale):
    hsv = color.rgb2hsv(x)
    hsv[..., 1] *= factor
    return color.hsv2rgb(hsv)


def _color_saturation_lab(x, factor, rng, scale):
    lab = color.rgb2lab(x)
    lab[..., 1:] *= factor
    return _lab2rgb(lab)


def _jpeg2000(x, ratio, rng, scale):
    return _through_codec(
        x, format="JPEG2000", no_jp2=True, quality_mode="rates", quality_layers=[ratio], irreversible=True
    )


def _jpeg(x, quality, rng, scale):
    return _through_codec(x, format="JPEG", quality=quality)


def _white_noise(x, variance, rng, scale):
    return util.random_noise(x, mode="gaussian", var=variance, rng=rng)


def _white_noise_ycbcr(x, variance, rng, scale):
    ycbcr = color.rgb2ycbcr(x) / 255
    return color.ycbcr2rgb(255 * (ycbcr + rng.normal(0, np.sqrt(variance), x.shape)))


def _impulse_noise(x, density, rng, scale):
    return util.random_noise(x, mode="s&p", amount=density, rng=rng)


def _multiplicative_noise(x, variance, rng, scale):
    return util.random_noise(x, mode="speckle", var=variance, rng=rng)


def _denoise(x, variance, rng, scale):
    """White noise, removed from each channel by itself: total variation here, the network DnCNN in KADID."""
    noisy = _white_noise(x, variance, rng, scale)
    weight = 2 * np.sqrt(variance)
    return np.stack([restoration.denoise_tv_chambolle(noisy[..., c], weight=weight) for c in range(3)], axis=-1)


def _brighten(x, amount, rng, scale):
    """A parabola that lifts the middle, in RGB and in the lightness of Lab, two parts to one."""
    lab = color.rgb2lab(x)
    lab[..., 0] = 100 * _lift_middle(lab[..., 0] / 100, amount)
    return (2 * _lift_middle(x, amount) + np.clip(_lab2rgb(lab), 0, 1)) / 3


def _darken(x, amount, rng, scale):
    return _lift_middle(x, -amount)


def _mean_shift(x, amount, rng, scale):
    return x + amount


def _jitter(x, amount, rng, scale):
    """Five times over, every pixel is fetched from a place nearby."""
    height, width, _ = x.shape
    grid = np.mgrid[:height, :width].astype(np.float64)
    for _ in range(5):
        places = grid + rng.normal(0, amount * scale, grid.shape)
        x = np.stack([ndimage.map_coordinates(x[..., c], places, order=1, mode="nearest") for c in range(3)], axis=-1)
    return x


def _non_eccentricity_patch(x, patches, rng, scale):
    """Patches of 16 x 16 pixels copied to a place up to 8 pixels away."""
    size, reach = _length(16, scale), max(1.0, 8 * scale)
    out = x.copy()
    for _ in range(patches):
        source = np.array([rng.integers(0, max(1, extent - size + 1)) for extent in x.shape[:2]])
        target = np.rint(source + rng.uniform(-reach, reach, 2)).astype(int)
        target = np.clip(target, 0, np.maximum(np.array(x.shape[:2]) - size, 0))
        patch = out[source[0] : source[0] + size, source[1] : source[1] + size].copy()
        out[target[0] : target[0] + size, target[1] : target[1] + size] = patch
    return out


def _pixelate(x, strength, rng, scale):
    height, width, _ = x.shape
    factor = 0.95 - strength**0.6
    image = Image.fromarray(_uint8(x))
    small = image.resize((max(1, int(width * factor)), max(1, int(height * factor))), Image.Resampling.NEAREST)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST)) / 255


def _quantization(x, values, rng, scale):
    """Equally spaced values from the darkest to the brightest; KADID places its thresholds by Otsu's method."""
    low, high = x.min(), x.max()
    if low == high:
        return x
    return low + (high - low) * np.rint((x - low) / (high - low) * (values - 1)) / (values - 1)


def _color_block(x, blocks, rng, scale):
    """Blocks of 32 x 32 pixels in random colours."""
    size, out = _length(32, scale), x.copy()
    for _ in range(blocks):
        row, column = (rng.integers(0, max(1, extent - size + 1)) for extent in x.shape[:2])
        out[row : row + size, column : column + size] = rng.uniform(0, 1, 3)
    return out


def _high_sharpen(x, amount, rng, scale):
    """Unsharp masking of the lightness, with a radius of 3 pixels."""
    lab = color.rgb2lab(x)
    lab[..., 0] += amount * (lab[..., 0] - _blur(lab[..., 0], 3 * scale))
    lab[..., 0] = np.clip(lab[..., 0], 0, 100)
    return _lab2rgb(lab)


def _contrast_change(x, amount, rng, scale):
    curve = interpolate.CubicSpline([0, 0.3, 0.5, 0.7, 1], [0, 0.25 - amount / 4, 0.5, 0.75 + amount / 4, 1])
    return curve(x)


def _lift_middle(x: np.ndarray, amount: float) -> np.ndarray:
    """The parabola through (0, 0), (0.5, 0.5 + amount / 2) and (1, 1)."""
    return np.clip((1 + 2 * amount) * x - 2 * amount * x**2, 0, 1)


def _length(pixels: float, scale: float) -> int:
    return max(2, round(pixels * scale))


def _uint8(x: np.ndarray) -> np.ndarray:
    return np.rint(x * 255).astype(np.uint8)


def _lab2rgb(lab: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        # Strong colours leave the solid on purpose: skimage clips them, as wanted, and warns.
        warnings.filterwarnings("ignore", message="Conversion from CIE-LAB", category=UserWarning)
        return color.lab2rgb(lab)


def _through_codec(x: np.ndarray, **options) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(_uint8(x)).save(buffer, **options)
    return np.asarray(Image.open(buffer).convert("RGB")) / 255


_FUNCTIONS = {name: globals()[f"_{name}"] for name in DISTORTIONS}
