"""Mean and covariance of rows that arrive in batches, without keeping the rows."""

import torch


class RunningMoments:
    """Mean and unbiased covariance of all rows seen, in float64 on the CPU.

    Batches are centred before they are squared and joined by the pairwise update of Chan, Golub and LeVeque (1979,
    Eq. 2.1): a mean that is large beside the spread costs no precision, as it would in sums of raw squares.

    Args:
        dim (`int`): length of a row.
        covariance (`bool`): keep the `dim * dim` second moments; without them only `variance` is known.

    Example:
        >>> moments = RunningMoments(dim=64)
        >>> for batch in batches:  # (rows, 64)
        ...     moments.update(batch)
        >>> moments.mean, moments.covariance
    """

    def __init__(self, dim: int, covariance: bool = True):
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        # sums of squares about the mean, or only their diagonal
        self._scatter = torch.zeros((dim, dim) if covariance else (dim,), dtype=torch.float64)

    @torch.no_grad()
    def update(self, rows: torch.Tensor) -> None:
        """Add a batch.

        Args:
            rows (`torch.Tensor` of shape `(num_rows >= 1, dim)`): finite, of any dtype and device.

        Raises:
            ValueError: wrong shape, no row, or values that are not finite.
        """
        dim = len(self._mean)
        if rows.ndim != 2 or len(rows) < 1 or rows.shape[1] != dim:
            raise ValueError(f"rows must have shape (num_rows >= 1, {dim}), got {tuple(rows.shape)}.")
        rows = rows.cpu().double()
        if not bool(rows.isfinite().all()):
            raise ValueError("rows must be finite, got NaN or infinity: one such row would spoil every statistic.")
        mean = rows.mean(0)
        centred, shift = rows - mean, mean - self._mean
        total = self.count + len(rows)
        weight = self.count * len(rows) / total
        if self._scatter.ndim == 2:
            self._scatter += centred.T @ centred + weight * torch.outer(shift, shift)
        else:
            self._scatter += centred.square().sum(0) + weight * shift.square()
        self._mean += shift * (len(rows) / total)
        self.count = total

    @property
    def mean(self) -> torch.Tensor:
        """Float64 of shape `(dim,)`. Raises ValueError before the first row."""
        self._check_count(1)
        return self._mean.clone()

    @property
    def covariance(self) -> torch.Tensor:
        """Float64 of shape `(dim, dim)`, divided by n - 1. Raises ValueError with fewer than two rows."""
        if self._scatter.ndim == 1:
            raise ValueError("no covariance was kept: use RunningMoments(dim, covariance=True), or .variance.")
        self._check_count(2)
        return self._scatter / (self.count - 1)

    @property
    def variance(self) -> torch.Tensor:
        """Float64 of shape `(dim,)`, divided by n - 1. Raises ValueError with fewer than two rows."""
        self._check_count(2)
        squares = self._scatter.diagonal() if self._scatter.ndim == 2 else self._scatter
        return squares / (self.count - 1)

    def _check_count(self, needed: int):
        if self.count < needed:
            raise ValueError(f"the statistic needs at least {needed} rows, got {self.count}: call update first.")
