"""What tokens cost, from prices that the user gives and times that were measured. Nothing is guessed.

A price file is TOML::

    currency = "USD"
    per_kwh = 0.30        # of electricity, where energy can be measured; may be left out

    [per_hour]            # of the machine that a backend runs on
    numba = 0.085
    cupy = 2.50
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minibert.errors import UserError

KEYS = ("currency", "per_hour", "per_kwh")
JOULES_PER_KWH = 3.6e6


class Cost(NamedTuple):
    """What a million tokens cost, and how that was reckoned."""

    per_million_tokens: float
    basis: str


@dataclass(frozen=True)
class Prices:
    """What the file says."""

    currency: str
    per_hour: Mapping[str, float]  # by backend
    per_kwh: float | None = None

    def cost(self, backend: str, seconds: float, joules: float | None, tokens: int, unmetered: str) -> Cost | str:
        """Of work on so many tokens that took so long; or why it cannot be said. `unmetered`: why joules are None."""
        total, parts = 0.0, []
        if backend in self.per_hour:
            total += self.per_hour[backend] * seconds / 3600
            parts.append(f"{self.per_hour[backend]:g} {self.currency} an hour x measured time")
        if self.per_kwh is not None and joules is not None:
            total += self.per_kwh * joules / JOULES_PER_KWH
            parts.append(f"{self.per_kwh:g} {self.currency} a kWh x measured energy")
        if not parts:
            metered = f", and energy is unavailable: {unmetered}" if self.per_kwh is not None else ""
            return f"the price file has no [per_hour] {backend}{metered}"
        if self.per_kwh is not None and joules is None:
            parts[-1] += f" (energy left out, being unavailable: {unmetered})"
        return Cost(total / tokens * 1e6, " + ".join(parts))


def read_prices(path: Path, backends: Collection[str]) -> Prices:
    """Read a price file. Raises UserError for one that is not as the module's docstring shows.

    `backends`: the names that may stand under [per_hour].
    """
    try:
        given: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"--prices: there is no file {path}") from None
    except OSError as error:
        raise UserError(f"--prices: {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--prices: {path} is no TOML: {' '.join(str(error).split())}") from None
    for key in given:
        if key not in KEYS:
            raise UserError(f"--prices: {path}: expected {', '.join(KEYS)}, got {key!r}")
    currency = given.get("currency")
    if not isinstance(currency, str) or not currency.strip() or "\n" in currency:
        raise UserError(f'--prices: {path}: expected a currency such as currency = "USD", got {currency!r}')
    hourly = given.get("per_hour", {})
    if not isinstance(hourly, dict):
        raise UserError(f"--prices: {path}: per_hour: expected a table of backends' prices, got {hourly!r}")
    for name in hourly:
        if name not in backends:
            raise UserError(f"--prices: {path}: per_hour: expected {', '.join(backends)}, got {name!r}")
    per_hour = {name: _price(path, f"per_hour {name}", price) for name, price in hourly.items()}
    per_kwh = _price(path, "per_kwh", given["per_kwh"]) if "per_kwh" in given else None
    if not per_hour and per_kwh is None:
        raise UserError(f"--prices: {path} has no price: give [per_hour] by backend, or per_kwh")
    return Prices(currency.strip(), per_hour, per_kwh)


def _price(path: Path, name: str, price: Any) -> float:
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price <= sys.float_info.max:
        raise UserError(f"--prices: {path}: {name}: expected a number that is not negative, got {price!r}")
    return float(price)
