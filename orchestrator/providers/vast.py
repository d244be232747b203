"""Vast.ai: a market of other people's machines, rented as containers, at a fixed price or by a bid."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, ClassVar

from orchestrator import clock, onstart
from orchestrator.errors import ConfigError, GpuError, LaunchUnknown, NoCapacity, ProviderDown, Refused
from orchestrator.providers import (
    images,
    pace,
    vast_answers,
    vast_errors,
    vast_filters,
    vast_log,
    vast_order,
    vast_search,
)
from orchestrator.providers.base import Gate, GuardOrder, HostKey, Instance, Need, Offer, Order
from orchestrator.providers.client import Api, Call, Client, Reply
from orchestrator.providers.pace import Lane
from orchestrator.providers.vast_errors import DASHBOARD, NOTHING, TITLE
from orchestrator.providers.vast_search import Search

_URL = "https://console.vast.ai"
_EVERY_S = 0.1
_SEARCHES = Lane("search", 62.0, 9)
_CREATES = Lane("create", 5.0)
_DESTROYS = Lane("destroy", 3.2)
_SHOWS = Lane("show", 2.1)
_LISTS = Lane("list", 1.1)
_CHANGES = Lane("manage", 1.1)
_KEYS = Lane("keys", 1.1)
_LOGS = Lane("logs", 2.1)
_COPIES = Lane("copy", 3.7)
"""Its limits are per endpoint, counted where calls arrive (10 searches a minute, a creation in 4.5 s, …): a little more
lets no two meet."""
_CREATE_READ_S = 120.0
_COPY_READ_S = 15.0
_COPIER = "vastai_kaalia"
_SEARCH_PAGES = 5
_LIST_PAGES = 50
_LIST_LIMIT = 25
_UNDO_TRIES = 5
_UNDO_PAUSE_S = 10.0


class VastCloud:
    """One account at Vast.ai. `GPU_VAST_URL` leads tests to another server.

    The account has no public keys of ours: each is let into one instance alone (`admit`), since keys of an account are
    let into every machine in it, a team's API key may add none, and what a start script lets in is soon overwritten.
    """

    name: ClassVar[str] = "vast"
    dashboard: ClassVar[str] = DASHBOARD
    boot_minutes: ClassVar[tuple[float, float]] = (4.0, 6.0)
    let_in_s: ClassVar[float] = 90.0
    active_s: ClassVar[tuple[float, float]] = (900.0, 1500.0)
    guard: ClassVar[str | None] = "container"
    takes_host_key: ClassVar[bool] = False
    can_stop: ClassVar[bool] = True
    filters: ClassVar[tuple[str, ...]] = tuple(vast_filters.FILTERS)

    def __init__(self, key: str) -> None:
        self._url = (os.environ.get("GPU_VAST_URL") or _URL).rstrip("/")
        self.api_url = f"{self._url}/api/v0"
        self.account = pace.account("vast", key)
        self._client = Client(Api("vast", TITLE, f"{self._url}/api", key, vast_answers.complaint, _EVERY_S))

    @property
    def skew_s(self) -> float | None:
        """By how much its clock was ahead of this computer's at its last answer, in seconds; None: it never said."""
        return self._client.skew_s

    # --- the market --------------------------------------------------------------------------------------------------

    def offers(self, need: Need) -> list[Offer]:
        """What is free, with its disk in the price, cheapest first; every field looked at again here.

        Raises UsageError for a filter that makes no sense, ConfigError for an image that cannot be had, NoCapacity when
        the bid is too low for everything that fits. When nothing fits, others come, so that it can be said why.
        """
        search = vast_search.search(need)
        if search is None:
            return []
        if search.wishes.image:
            images.pinned(search.wishes.image)
        found = search.offers(self._searched(search, _SEARCH_PAGES))
        if not found:
            found = search.relaxed().offers(self._searched(search.relaxed(), 1))
        return sorted(found, key=lambda offer: (offer.price_usd_per_hour, offer.offer_id))

    def overridden(self, need: Need) -> list[str]:
        """The defaults that protect and that a need does not keep, in words. UsageError for a filter without sense."""
        return vast_filters.overridden(need)

    def _searched(self, search: Search, pages: int) -> list[Any]:
        """The market's answers, page by page: each begins at the price at which the last one ended.

        Where a page came no further than that price, the next one is asked for without those that were seen there.
        """
        found: dict[str, Any] = {}
        floor: float | None = None
        seen: list[str] = []
        for _ in range(pages):
            call = Call(
                "POST",
                "/v0/bundles/",
                search.body(floor, seen),
                lane=_SEARCHES,
                needs="offers",
                final_codes=(vast_answers.QUOTA,),
            )
            page = self._done(call, "search its offers").document["offers"]
            if not isinstance(page, list):
                raise ProviderDown(f"{TITLE} could not search its offers: its answer is no list. {NOTHING}")
            ids = [vast_answers.identifier(entry, "id") if isinstance(entry, dict) else None for entry in page]
            new = {one: entry for one, entry in zip(ids, page, strict=True) if one is not None and one not in found}
            found |= new
            top = vast_search.top_usd(page)
            if len(page) < vast_search.LIMIT or search.is_over(top):
                break
            is_stuck, floor = floor is not None and top <= floor, max(top, floor or 0.0)
            if seen and not new:  # what it is asked to leave out it does not
                floor, seen = floor + 1e-6, []
            else:
                seen = vast_search.from_price(found, floor) if is_stuck or not new else []
        return list(found.values())

    # --- what spends money -------------------------------------------------------------------------------------------

    def launch(self, offer: Offer, order: Order) -> str:
        """Rent a machine, asked once; returns the instance's id. **Spends money.**

        A refusal that names an instance all the same has made one: its end is asked for before anything is raised, and
        while that is not accepted the error is a LaunchUnknown.
        """
        what = f"rent offer {offer.offer_id}, {offer.type_name} (marker {order.marker})"
        path = f"/v0/asks/{_checked(offer.offer_id, 'an offer')}/"
        body, script = vast_order.body(offer, order), order.start_script
        call = Call("PUT", path, body, read_s=_CREATE_READ_S, lane=_CREATES, needs="new_contract", private=script)
        reply = self._client.once(call)
        instance_id = vast_answers.contract(reply.document)
        if reply.outcome == "ok" and instance_id is not None:
            return instance_id
        if instance_id is not None:
            self._undo(instance_id, reply, what)
        if reply.outcome == "refused" and reply.code == vast_answers.BAD_PRICE:
            raise vast_errors.bid_error(self._client, reply, what, self._floor_usd(offer))
        raise vast_errors.launch_error(self._client, reply, what)

    def _undo(self, instance_id: str, reply: Reply, what: str) -> None:
        """End an instance that a failed answer names. LaunchUnknown, naming it, when that is not accepted.

        That it is absent is not enough: it may not be listed yet.
        """
        for attempt in range(_UNDO_TRIES):
            if attempt:
                clock.sleep(_UNDO_PAUSE_S)
            end = self._asked_to_end(instance_id)
            if end.outcome == "ok":
                return
            if not vast_errors.is_absent(end):
                break
        raise vast_errors.undo_error(self._client, reply, what, instance_id, end.words)

    def _floor_usd(self, offer: Offer) -> float | None:
        """The lowest bid that is taken for an offer now, asked once; None when that is not told."""
        asked = {"ask_contract_id": {"eq": int(offer.offer_id)}, "type": "bid", "limit": 1}
        reply = self._client.once(Call("POST", "/v0/bundles/", asked, lane=_SEARCHES, needs="offers"))
        entries = reply.document["offers"] if reply.outcome == "ok" else None
        found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        same = (entry for entry in found if vast_answers.identifier(entry, "id") == offer.offer_id)
        return next((vast_answers.number(entry, "min_bid") for entry in same), None)

    def terminate(self, instance_id: str) -> None:
        """Ask for the end of an instance, some times if need be; absent is success. Its disk is gone with it.

        Raises AuthRejected, ProviderDown (it was never reached) or NotReturned: the instance goes on costing.
        """
        reply = self._asked_to_end(instance_id)
        if reply.outcome == "ok" or vast_errors.is_absent(reply):
            return
        if reply.outcome != "refused" or vast_errors.is_key_refused(reply) or not self._is_gone(instance_id):
            raise vast_errors.end_error(self._client, reply, instance_id)

    def _asked_to_end(self, instance_id: str) -> Reply:
        path = f"/v0/instances/{_checked(instance_id)}/"
        return self._client.repeat(Call("DELETE", path, {}, read_s=60.0, lane=_DESTROYS, needs="success"))

    def _is_gone(self, instance_id: str) -> bool:
        """Whether there is surely no such instance; what cannot be asked is not gone."""
        try:
            return self.get(instance_id) is None
        except GpuError:
            return False

    def stop(self, instance_id: str) -> None:
        """Have an instance stopped, its disk kept and billed; absent is success."""
        reply = self._client.repeat(self._state_call(instance_id, "stopped"))
        if reply.outcome != "ok" and not vast_errors.is_absent(reply):
            raise self._error(reply, f"stop instance {instance_id}")

    def start(self, instance_id: str) -> None:
        """Have a stopped instance started again. **Spends money.**

        NoCapacity when its GPUs are in other hands: the request, which would wait until they are free, is taken back.
        LaunchUnknown when it may have been started.
        """
        reply = self._client.until_sent(self._state_call(instance_id, "running"))
        if vast_answers.QUEUED in vast_errors.said(reply):
            self._take_back(instance_id)
            raise NoCapacity(
                f"The GPUs of instance {instance_id} at {TITLE} are in other hands just now; it stays stopped, and its "
                "disk goes on costing.",
                "Wait, or carry on elsewhere: gpu resume RUN --gpu …",
            )
        if reply.outcome == "ok":
            return
        if reply.outcome in ("unclear", "moved"):
            said = self._client.hide(f"{TITLE} was asked to start instance {instance_id}: {reply.words}")
            raise LaunchUnknown(f"{said}. It may be running, and costing money.", f"Look: {DASHBOARD}")
        raise self._error(reply, f"start instance {instance_id}")

    def gate(self, instance_id: str, path: str) -> Gate | None:
        """Have a way opened to a folder on the disk of an instance, stopped or not, by which its host lets us read.

        Asked once: whoever waits for it pays for that disk.
        """
        body = {"client_id": "me", "src_id": _checked(instance_id), "dst_id": None, "src_path": path, "dst_path": path}
        call = Call("PUT", "/v0/commands/rsync/", body, read_s=_COPY_READ_S, lane=_COPIES, needs="src_addr")
        reply = self._client.once(call)
        if reply.outcome != "ok":
            raise self._error(reply, f"open a way to the disk of instance {instance_id}")
        endpoint = vast_answers.gate(reply.document)
        if endpoint is None:
            raise ProviderDown(f"{TITLE} told no usable way to the disk of instance {instance_id}. {NOTHING}")
        return Gate(endpoint, _COPIER, instance_id)

    def _take_back(self, instance_id: str) -> None:
        """Stop an instance whose start waits. LaunchUnknown when that is not accepted: it may start at any time."""
        try:
            self.stop(instance_id)
        except GpuError as error:
            raise LaunchUnknown(
                f"Instance {instance_id} at {TITLE} waits for its GPUs, and starts by itself, costing money, when they "
                f"are free: to take that back was not accepted. {error.message}",
                f"Stop it, or end it, yourself: {DASHBOARD}",
            ) from None

    def _state_call(self, instance_id: str, state: str) -> Call:
        path = f"/v0/instances/{_checked(instance_id)}/"
        return Call("PUT", path, {"state": state}, lane=_CHANGES, needs="success")

    # --- what there is -----------------------------------------------------------------------------------------------

    def get(self, instance_id: str) -> Instance | None:
        """One instance; None only when Vast.ai itself says, in its own form, that there is no such thing."""
        path = f"/v0/instances/{_checked(instance_id)}/"
        reply = self._client.repeat(Call("GET", path, query={"owner": "me"}, lane=_SHOWS, needs="instances"))
        if vast_errors.is_absent(reply):
            return None
        if reply.outcome != "ok":
            raise self._error(reply, f"show instance {instance_id}")
        if reply.document["instances"] is None:
            return None
        found = vast_answers.instance(reply.document["instances"])
        if found is None or found.instance_id != instance_id:
            raise ProviderDown(
                f"{TITLE} was asked for instance {instance_id} and answered with something else. {NOTHING}"
            )
        return found

    def instances(self) -> list[Instance]:
        """All of the account, stopped ones too, whose disks cost; ProviderDown when the list is not surely whole."""
        found: dict[str, Instance] = {}
        query = {"limit": str(_LIST_LIMIT), "order_by": '[{"col":"id","dir":"asc"}]'}
        token: Any = None
        for _ in range(_LIST_PAGES):
            call = Call("GET", "/v1/instances/", query=query, lane=_LISTS, needs="instances")
            document = self._done(call, "list the account's instances").document
            entries = [] if document["instances"] is None else document["instances"]
            parsed = [vast_answers.instance(entry) for entry in entries] if isinstance(entries, list) else [None]
            if None in parsed:
                raise self._not_whole("an entry has no id that can be read")
            found |= {entry.instance_id: entry for entry in parsed if entry is not None}
            last, token = token, document.get("next_token")
            if token is None:
                if len(found) < (vast_answers.whole(document, "total_instances") or 0):
                    raise self._not_whole(f"{len(found)} came of {document['total_instances']}")
                return list(found.values())
            if token == last or not isinstance(token, str) or not token or self._client.hide(token) != token:
                break  # one that holds our key would carry it into an address
            query = {**query, "after_token": token}
        raise self._not_whole("its pages do not end")

    def _not_whole(self, why: str) -> ProviderDown:
        said = f"{TITLE} could not list the account's instances: {why}, so that what is rented is not known."
        return ProviderDown(f"{said} {NOTHING}", f"Look yourself: {DASHBOARD}")

    def storage(self) -> list[str]:
        """Volumes, which cost money until they are deleted. Disks of instances are not among them."""
        call = Call("GET", "/v0/volumes/", query={"owner": "me"}, needs="volumes", final_statuses=(404,))
        reply = self._client.repeat(call)
        if reply.outcome != "ok" and reply.status == 404 and not vast_errors.is_key_refused(reply):
            return []  # an API without volumes
        if reply.outcome != "ok":
            raise self._error(reply, "list the account's volumes")
        entries = reply.document["volumes"]
        return [vast_answers.volume(entry) for entry in entries] if isinstance(entries, list) else []

    def credit(self) -> float | None:
        """What is left of what was paid in, in USD; None when that is not told."""
        call = Call("GET", "/v0/users/current/", needs="id")
        document = self._done(call, "show the account").document
        value = document.get("credit")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number else None  # below zero, too

    def check_key(self) -> None:
        """One small read that needs the key. Raises AuthRejected when it is not accepted."""
        reply = self._client.once(Call("GET", "/v0/users/current/", needs="id"))
        if reply.outcome != "ok":
            raise self._error(reply, "show the account")

    # --- keys and first boot -----------------------------------------------------------------------------------------

    def ensure_key(self, public_key: str, name: str) -> str:
        """The name, unchanged: nothing is put into the account, see above. ConfigError for what is no public key."""
        vast_order.public_line(public_key)
        return name

    def key_names(self) -> list[str]:
        """None: the account has no keys of ours."""
        return []

    def remove_key(self, name: str) -> None:
        """Nothing: a key goes with the instance it was let into."""

    def admit(self, instance_id: str, public_key: str) -> None:
        """Have a public key let into an instance that is there; may be repeated. It takes some time until it is.

        Refused while the instance is not known (yet).
        """
        path = f"/v0/instances/{_checked(instance_id)}/ssh/"
        body = {"ssh_key": vast_order.public_line(public_key)}
        reply = self._client.repeat(Call("POST", path, body, lane=_KEYS, needs="success"))
        is_there = reply.outcome == "refused" and re.search("already|duplicate", vast_errors.said(reply)) is not None
        if reply.outcome != "ok" and (not is_there or vast_errors.is_key_refused(reply)):
            raise self._error(reply, f"let a public key into instance {instance_id}")

    def host_key(self, instance_id: str) -> str | None:
        """The host key that the start script wrote into the machine's log, read through the API; None while it did not.

        The log lies where everybody may read it who knows its address: it is asked for as nobody, there alone.
        """
        body = {"tail": "1000", "filter": onstart.HOST_KEY_PREFIX.strip()}
        path = f"/v0/instances/request_logs/{_checked(instance_id)}/"
        reply = self._client.repeat(Call("PUT", path, body, lane=_LOGS, needs="result_url"))
        if reply.outcome == "refused" and reply.status == 404 and not vast_errors.is_key_refused(reply):
            return None
        if reply.outcome != "ok":
            raise self._error(reply, f"show the log of instance {instance_id}")
        log = vast_log.fetched(reply.document["result_url"], self._url)
        return vast_answers.host_key(log) if log is not None else None

    def start_script(self, host_key: HostKey, guard: GuardOrder | None) -> str:  # noqa: ARG002 -- it makes its own
        """What the container runs at each start. It has no secret of ours: everybody at the host may read it.

        ConfigError without a guard: nobody else ends a machine there when this computer is off.
        """
        if guard is None:
            raise ConfigError(f"Every machine at {TITLE} has a guard; this one was given none. Nothing was rented.")
        return onstart.onstart(dataclasses.replace(guard, key=""))

    def _done(self, call: Call, doing: str) -> Reply:
        """The answer of a call that may be repeated, when it is a good one; else the error that says why it is none."""
        reply = self._client.repeat(call)
        if reply.outcome != "ok":
            raise self._error(reply, doing)
        return reply

    def _error(self, reply: Reply, doing: str) -> GpuError:
        return vast_errors.error(self._client, reply, doing)


def _checked(value: str, what: str = "an instance") -> str:
    """The id, when it can be one: it becomes part of a path."""
    if not vast_answers.ID.fullmatch(value):
        raise Refused(f"{value[:80]!r} cannot be the id of {what} at {TITLE}. {NOTHING}")
    return value
