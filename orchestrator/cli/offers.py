"""`gpu offers`: what can be rented."""

from __future__ import annotations

from typing import Any

import click

from orchestrator import errors, ledger, market
from orchestrator import offers as wanted
from orchestrator.cli import output, wishes
from orchestrator.plain import plain
from orchestrator.providers.base import Offer


@click.command()
@wishes.need
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def offers(as_json: bool, **how: Any) -> None:
    """What can be rented, cheapest first; what cannot be had just now comes last.

    \b
    Example:  gpu offers --gpu A100 --max-price 2
    """
    asked = market.need(how)
    clouds = market.accounts(how["provider"])
    for words in market.overridden(clouds, asked):
        click.echo(words, err=True)
    listed = market.listed(clouds, asked, lambda words: click.echo(plain(words), err=True))
    try:
        found = wanted.suitable(listed, asked, had_or_not=True)
    except errors.NoCapacity:
        if as_json:
            output.document([])
        raise
    if as_json:
        output.document([wanted.document(offer) for offer in found])
        return
    titles = ["PROVIDER", "OFFER", "TYPE", "GPU", "VRAM", "REGION", "USD/H", "SPOT", "AVAILABLE"]
    output.columns(titles, [_line(offer) for offer in found])


def _line(offer: Offer) -> list[str]:
    gpu = f"{offer.count}x {offer.gpu}" if offer.gpu else "-"
    vram = f"{offer.vram_gb:g} GB" if offer.vram_gb else "-"
    available = "yes" if offer.available else "no"
    return [
        offer.provider,
        offer.offer_id,
        offer.type_name,
        gpu,
        vram,
        offer.region or "-",
        ledger.shown(offer.price_usd_per_hour),
        "yes" if offer.spot else "no",
        available,
    ]
