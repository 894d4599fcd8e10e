"""Sliced Wasserstein distance (SWD) between two sets of images, one number for each scale; no network looks at them.

Karras et al., "Progressive Growing of GANs", 2018, section 5: patches of 7 x 7 pixels from every band of the Laplacian
pyramid. A band shows at which scale two sets differ: `swd-64` is of details of 1 to 2 pixels of a 64 px image, `swd-16` of
its coarse layout and colours. Unlike theirs, generated patches are standardised by the real ones' mean and spread and not
by their own, so that a shift of colour or contrast counts.
"""

import numpy as np
import torch
import torch.nn.functional as F

from acpo_utils.evaluation.image_batches import Images, image_batches


COARSEST = 16  # pixels; the pyramid ends where the next band would be smaller
PATCH = 7  # pixels
PATCHES = 128  # of an image in each band, at the same places in every image
DIRECTIONS = 256
BINS = 64  # of a projection's distribution
REFERENCE_IMAGES = 128  # the real images from which places on the scales are taken


def laplacian_pyramid(images: torch.Tensor) -> list[torch.Tensor]:
    """The bands of `images` (B, 3, H, W), fine to coarse: each half as large as that before, the last the image itself.

    Burt and Adelson (1983), binomial kernel of five taps, edges reflected; enlarged and added up they give the images
    back. The shorter side of the last band is at least `COARSEST` and less than twice that.
    """
    bands = []
    while min(images.shape[-2:]) >= 2 * COARSEST:
        smaller = _blur(images)[..., ::2, ::2]
        spread = torch.zeros_like(images)
        spread[..., ::2, ::2] = smaller
        bands.append(images - 4 * _blur(spread))
        images = smaller
    return [*bands, images]


def _blur(images: torch.Tensor) -> torch.Tensor:
    tap = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).to(images) / 16
    kernel = (tap[:, None] * tap).repeat(images.shape[1], 1, 1, 1)  # (3, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])


def band_patches(band: torch.Tensor, level: int) -> torch.Tensor:
    """`PATCHES` patches of each of (B, 3, h, w), (B, PATCHES, 3, PATCH * PATCH); the places depend on h, w and `level`."""
    generator = torch.Generator().manual_seed(level)
    tops = torch.randint(band.shape[-2] - PATCH + 1, (PATCHES,), generator=generator).tolist()
    lefts = torch.randint(band.shape[-1] - PATCH + 1, (PATCHES,), generator=generator).tolist()
    return torch.stack(
        [band[..., top : top + PATCH, left : left + PATCH].flatten(2) for top, left in zip(tops, lefts)], dim=1
    )


class SlicedWasserstein:
    """Distances of sets of images from the `real` ones, by scale: `draws`, and the names of the bands in `bands`.

    A projection of both sets' patches to one direction leaves two distributions of numbers, whose Wasserstein distance is
    the area between their cumulative distributions, F and G; the distance is the mean of `DIRECTIONS` such areas. Here
    the area is the sum over bins of |integral of F - G|, which is the area itself but for bins in which the sign changes
    (tests: within 1 % of the sorted lists). The integrals of a set are the means of its images' own, so that drawing
    images again is a product of matrices, and no more than a batch is in memory.

    Args:
        real: at least one image, of the size of those that will be measured, the shorter side at least 7 pixels.
    Raises:
        ValueError: for no or too small images.
    """

    def __init__(self, real: Images):
        if not len(real):
            raise ValueError("SWD needs real images, found none")
        chosen = np.linspace(0, len(real) - 1, min(len(real), REFERENCE_IMAGES)).astype(int).tolist()
        patches = [self._patches(batch) for _, batch in image_batches(real, chosen)]
        self.scales = []
        for level, parts in enumerate(zip(*patches)):
            x = torch.cat(parts)  # (N, PATCHES, 3, PATCH * PATCH)
            mean = x.mean((0, 1, 3), keepdim=True)
            std = x.std((0, 1, 3), keepdim=True).clamp_min(1e-6)
            directions = torch.randn(3 * PATCH**2, DIRECTIONS, generator=torch.Generator().manual_seed(level))
            self.scales.append((mean, std, F.normalize(directions, dim=0)))
        self.edges = [self._bin_edges(torch.cat(parts), level) for level, parts in enumerate(zip(*patches))]
        (_, first), *_ = image_batches(real, [0])
        self.bands = [f"swd-{min(band.shape[-2:])}" for band in laplacian_pyramid(first)]
        everything = np.full((1, len(real)), 1 / len(real))
        self.real = [integrals[0] for integrals in self._integrals(real, everything)]

    def draws(self, images: Images, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The distance in each band, {"swd-64": (D,), ...}, for each row of `weights` (D, N) over the N images.

        Weights are as `bootstrap_weights` gives them: each row sums to 1. 0 is best. Raises ValueError for another size
        of images than the real ones'.
        """
        integrals = self._integrals(images, weights)
        distances = [(of_set - real).abs().sum(-1).mean(-1) for of_set, real in zip(integrals, self.real)]  # (D,)
        return {band: distance.double().numpy() for band, distance in zip(self.bands, distances)}

    def _patches(self, images: torch.Tensor) -> list[torch.Tensor]:
        if min(images.shape[-2:]) < PATCH:
            size = "x".join(map(str, images.shape[-2:]))
            raise ValueError(f"SWD needs images of at least {PATCH} pixels a side, found {size}")
        return [band_patches(band, level) for level, band in enumerate(laplacian_pyramid(images))]

    def _project(self, patches: torch.Tensor, level: int) -> torch.Tensor:
        """(B, PATCHES, DIRECTIONS)."""
        mean, std, directions = self.scales[level]
        return ((patches - mean) / std).flatten(2) @ directions

    def _bin_edges(self, patches: torch.Tensor, level: int) -> torch.Tensor:
        """(DIRECTIONS, BINS + 1), half of them quantiles and half of them evenly spaced."""
        x = self._project(patches, level).flatten(0, 1).sort(0).values  # (N * PATCHES, DIRECTIONS)
        quantiles = x[torch.linspace(0, len(x) - 1, BINS // 2 + 1).long()]
        share = torch.linspace(0, 1, BINS // 2 + 2)[1:-1, None]
        edges = torch.cat([quantiles, x[:1] + share * (x[-1:] - x[:1])]).sort(0).values
        return edges.T.contiguous()

    def _integrals(self, images: Images, weights: np.ndarray) -> list[torch.Tensor]:
        """For each band the integral of F over every bin, and of F below the first and of 1 - F above the last of them:
        (D, DIRECTIONS, BINS + 2)."""
        totals = [torch.zeros(len(weights), DIRECTIONS * (BINS + 2)) for _ in self.scales]
        shares = torch.from_numpy(weights).float()  # (D, N)
        for rows, batch in image_batches(images):
            patches = self._patches(batch)
            if len(patches) != len(self.scales):
                raise ValueError(f"SWD needs images of one size, found {tuple(batch.shape[-2:])} and the real ones'")
            for level, part in enumerate(patches):
                own = _bin_integrals(self._project(part, level), self.edges[level])  # (B, DIRECTIONS, BINS + 2)
                totals[level] += shares[:, rows] @ own.flatten(1)
        return [total.unflatten(1, (DIRECTIONS, BINS + 2)) for total in totals]


def _bin_integrals(x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Of each image's own distribution F the integral of F over each bin, below the first, and of F - 1 above the last.

    x: (B, P, D), P values in each of D directions. edges: (D, K), ascending. Returns (B, D, K + 1). The integral of F up to
    an edge e is the mean of max(e - x, 0): e times the share of the values below it, minus their sum.
    """
    x = x.permute(2, 0, 1).contiguous()  # (D, B, P)
    bins = torch.searchsorted(edges, x.flatten(1)).view_as(x)  # (D, B, P), in 0 .. K
    empty = x.new_zeros(*x.shape[:2], edges.shape[1] + 1)  # (D, B, K + 1)
    counts = empty.scatter_add(2, bins, torch.ones_like(x))
    sums = empty.scatter_add(2, bins, x)
    below = (edges[:, None] * counts[..., :-1].cumsum(2) - sums[..., :-1].cumsum(2)) / x.shape[2]  # (D, B, K)
    above = (edges[:, -1:] * counts[..., -1] - sums[..., -1]) / x.shape[2]  # (D, B), not above 0
    return torch.cat([below[..., :1], below.diff(dim=2), above[..., None]], dim=2).transpose(0, 1)
