"""The one run of a server: rollouts are sampled, rewards are taken or refused, full batches are trained on."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, cast

from grpo_gsm8k.errors import DiskError
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.runs.clean import one_line
from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.forms import end_ids
from grpo_gsm8k.serve.jobs import Refusal, SampleJob
from grpo_gsm8k.serve.rollouts.draw import draw
from grpo_gsm8k.serve.rollouts.run import Ended, Group, Rejected, Run, Settings, data_of, group_id
from grpo_gsm8k.serve.store import put

SPACE, HISTORY = "rollouts", "rollouts/updates"  # in the journal
CURRENT, NEXT = "run", "next"  # keys of the run and of the number of its next group; those of groups are their ids
MOST_OPEN = 1 << 17  # rollouts that wait for a reward
MOST_SHOWN = 16  # sample texts that the page shows
MOST_HISTORY = 1000  # updates that it draws
ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "grad_clip_norm": 1.0}


class Rollouts:
    """The one run of this server. Methods are coroutines of one event loop; an update holds the lock."""

    def __init__(self, service: Service) -> None:
        """Read the journal; what a crash interrupted goes on with the next request."""
        self.service = service
        self.lock = asyncio.Lock()
        stored = service.store.notes(SPACE)
        self.run = Run.of_json(stored.pop(CURRENT)) if CURRENT in stored else None
        self.next_group = int(stored.pop(NEXT, 0))
        mine = [value for key, value in stored.items() if self.run and key.startswith(f"{self.run.id}-")]
        groups = [Group.of_json(value) for value in mine if "samples" in value]
        self.groups = {group.number: group for group in groups}
        self.history: deque[dict[str, float]] = deque(service.store.notes(HISTORY).values(), maxlen=MOST_HISTORY)
        self.shown: deque[dict[str, Any]] = deque(maxlen=MOST_SHOWN)

    # ------------------------------------------------------------------------------------------ start and stop

    async def start(self, settings: Settings, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A new run from the base model; the rollouts of the run before are void. Raises `Refusal`."""
        async with self.lock:
            run = Run(secrets.token_hex(8), settings, asked=dict(asked or {}))
            session = await self.service.create_session(metadata={"rollouts": run.id}, key=f"rollouts:{run.id}")
            request, run.model_id = await self.service.create_model(
                session, rank=settings.lora_rank, seed=settings.seed, number=0
            )
            await self.service.wait(request)
            run.weights = await self._published(run)

            def change(db: Any) -> None:
                db.execute("DELETE FROM notes WHERE space IN (?, ?)", (SPACE, HISTORY))
                put(db, SPACE, CURRENT, asdict(run))

            await asyncio.wrap_future(self.service.store.write(change))
            self.run, self.next_group = run, 0
            self.groups.clear()
            self.history.clear()
            self.shown.clear()
            return self.status()

    async def stop(self) -> dict[str, Any]:
        """End the run; its weights stay."""
        async with self.lock:
            if self.run and self.run.state == "running":
                await self.keep(replace(self.run, state="stopped"))
            return self.status()

    def status(self) -> dict[str, Any]:
        """State, version, settings, and what waits for what."""
        run = self.run
        if run is None:
            none: dict[str, Any] = {"state": "stopped", "model_version": ["", 0], "settings": None, "open_rollouts": 0}
            return none | {"complete_groups": 0, "last_update": {}}
        open_ = [s for g in self.groups.values() if not self._stale(run, g) for s in g.samples if s.reward is None]
        return {
            "state": run.state,
            "model_version": [run.id, run.version],
            "settings": asdict(run.settings),
            "open_rollouts": len(open_) if run.state == "running" else 0,
            "complete_groups": len(self._complete()),
            "last_update": run.last_update,
        }

    def running(self) -> Run:
        """The run. Raises `Rejected` where it has ended or was never started."""
        if self.run is None:
            raise Rejected(409, "not_running", "no run was started; POST /v1/start first")
        if self.run.state != "running":
            raise Rejected(409, "not_running", f"the run {self.run.id} has ended; POST /v1/start begins another")
        return self.run

    # ------------------------------------------------------------------------------------------------ rollouts

    async def sample(
        self,
        prompts: Sequence[Any],
        prompt_ids: Sequence[Sequence[int]],
        *,
        n: int | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> tuple[list[Any], list[Group]]:
        """The model's version, and a group of completions of each prompt. Raises `Refusal`.

        Args:
            prompts: as the client sent them.
            seed: the same samples again; by default a seed of the run's and the group's number.
        """
        run = self.running()
        settings, base = run.settings, self.service.base
        if len(prompts) * (n or settings.n) + sum(group.n for group in self.groups.values()) > MOST_OPEN:
            raise Rejected(409, "too_many_open", f"{MOST_OPEN} rollouts wait for their rewards; send some first")
        first = self.next_group
        self.next_group += len(prompts)
        version, weights = run.version, run.weights
        heat = settings.temperature if temperature is None else temperature
        jobs = []
        for k, ids in enumerate(prompt_ids):
            own = derive_seed(settings.seed, "group", first + k) if seed is None else derive_seed(seed, "prompt", k)
            jobs.append(
                SampleJob(
                    token_ids=tuple(ids),
                    num_samples=n or settings.n,
                    max_tokens=min(max_tokens or settings.max_tokens, base.context - len(ids)),
                    temperature=heat,
                    seed=own,
                    stop_ids=end_ids(self.service),
                    stop_strings=tuple(stop),
                )
            )
        drawn = await draw(self.service, weights, jobs, stop)
        groups = [Group(first + k, version, prompt, list(prompt_ids[k]), drawn[k]) for k, prompt in enumerate(prompts)]
        if self.run is None or self.run.id != run.id or self.run.state != "running":
            raise Rejected(409, "not_running", f"the run {run.id} ended while its rollouts were sampled")
        after = self.next_group

        def change(db: Any) -> None:
            for group in groups:
                put(db, SPACE, group_id(run.id, group.number), asdict(group))
            put(db, SPACE, NEXT, after)

        await asyncio.wrap_future(self.service.store.write(change))
        self.groups |= {group.number: group for group in groups}
        return [run.id, version], groups

    # ------------------------------------------------------------------------------------------------- rewards

    async def reward(self, rewards: Sequence[tuple[str, float]]) -> dict[str, Any]:
        """Take rewards, all or none, and make the updates that they complete.

        Raises:
            Rejected: one of them is unknown, given already, or too late; or an update failed.
        """
        async with self.lock:
            self.running()
            await self._catch_up()  # an update that a crash interrupted, with the very groups that it had
            run = self.running()
            found = self._find(run, rewards)
            touched = {group.number: group for group, _, _ in found}

            def change(db: Any) -> None:
                for group in touched.values():
                    put(db, SPACE, group_id(run.id, group.number), asdict(group))

            for group, i, reward in found:
                group.samples[i].reward = reward
            try:
                await asyncio.wrap_future(self.service.store.write(change))
            except BaseException:
                for group, i, _ in found:
                    group.samples[i].reward = None
                raise
            try:
                updates = await self._catch_up()
            except DiskError as full:  # the rewards are on disk; the next request tries the update again
                self.service.refuse(str(full), "rollouts")
                updates = 0
            run = cast(Run, self.run)
            said = {"accepted": len(found), "updates": updates, "model_version": [run.id, run.version]}
            return said | {"complete_groups": len(self._complete())}

    def _find(self, run: Run, rewards: Sequence[tuple[str, float]]) -> list[tuple[Group, int, float]]:
        """Each reward with its group and its place there; the tests come in the order unknown, duplicate, late."""
        ids = [rollout_id for rollout_id, _ in rewards]
        places = [self._place(run, rollout_id) for rollout_id in ids]
        if unknown := [i for i, place in zip(ids, places, strict=True) if place is None]:
            raise Rejected(
                404, "unknown_rollout", f"there is no rollout {one_line(unknown[0], 80)} in this run", unknown
            )
        states = [self._state(run, *cast(tuple[int, int], place)) for place in places]
        twice = [i for k, (i, state) in enumerate(zip(ids, states, strict=True)) if state == "given" or i in ids[:k]]
        if twice:
            raise Rejected(409, "duplicate_reward", f"the rollout {twice[0]} has its reward already", twice)
        if late := [i for i, state in zip(ids, states, strict=True) if state == "late"]:
            most = run.settings.max_staleness
            why = f"the rollout {late[0]} is too old: the model is at version {run.version} and max_staleness is {most}"
            raise Rejected(409, "stale_rollout", why, late)
        return [
            (self.groups[place[0]], place[1], reward)
            for place, (_, reward) in zip(places, rewards, strict=True)
            if place is not None
        ]

    def _place(self, run: Run, rollout_id: str) -> tuple[int, int] | None:
        """(group, number in it) of a rollout of this run; None where there is none."""
        match = re.fullmatch(r"([0-9a-f]{16})-(0|[1-9]\d{0,11})-(0|[1-9]\d{0,5})", rollout_id)
        if match is None or match[1] != run.id:
            return None
        number, i = int(match[2]), int(match[3])
        group = self.groups.get(number) or self._ended(run, number)
        return (number, i) if group is not None and i < group.n else None

    def _state(self, run: Run, number: int, i: int) -> Literal["open", "given", "late"]:
        """Of a rollout that there is: whether its reward is awaited, is there, or would come too late."""
        group = self.groups.get(number)
        if group is None:
            ended = self._ended(run, number)
            return "late" if ended is not None and i in ended.without_reward else "given"
        if group.samples[i].reward is not None:
            return "given"
        return "late" if self._stale(run, group) else "open"

    def _ended(self, run: Run, number: int) -> Ended | None:
        """A group that was trained or came too late; the journal alone remembers it."""
        rows = self.service.store.read(
            "SELECT value FROM notes WHERE space = ? AND key = ?", SPACE, group_id(run.id, number)
        )
        stored = json.loads(rows[0]["value"]) if rows else {}
        return Ended(**stored) if "without_reward" in stored else None

    @staticmethod
    def _stale(run: Run, group: Group) -> bool:
        return run.version - group.version > run.settings.max_staleness

    def _complete(self) -> list[Group]:
        return [group for _, group in sorted(self.groups.items()) if group.complete]

    # ------------------------------------------------------------------------------------------------- updates

    async def catch_up(self) -> None:
        """Make the updates that a crash has interrupted."""
        async with self.lock:
            await self._catch_up()

    async def _catch_up(self) -> int:
        """Updates while there are full batches; how many."""
        made = 0
        while self.run and self.run.state == "running":
            batch = self._complete()[: self.run.settings.groups_per_batch]
            if len(batch) < self.run.settings.groups_per_batch:
                break
            await self._update(self.run, batch)
            made += 1
        return made

    async def _update(self, run: Run, batch: list[Group]) -> None:
        """One step on a batch. Its requests have keys of their own, so after a crash they are found, not repeated.

        A group is trained or dropped once, so the first one's number tells a batch from one that failed before it.
        """
        began, service = time.monotonic(), self.service
        key, after = f"rollouts:{run.id}:{run.version}:{batch[0].number}", replace(run, version=run.version + 1)
        try:
            data, adam = data_of(batch, run.settings), {**ADAM, "learning_rate": run.settings.learning_rate}
            request = await service.forward_backward(run.model_id, data, run.settings.loss_fn, key=f"{key}:gradient")
            gradient = await service.wait(request)
            step = await service.wait(await service.optim_step(run.model_id, adam, key=f"{key}:step"))
        except Refusal as refusal:
            if refusal.status in (429, 503):  # the server ends, or is too busy: the same batch is trained later
                raise
            await self._commit(run, batch, {})
            service.refuse(f"update {run.version + 1} of the run {run.id}: {refusal}", "rollouts")
            raise Rejected(409, "update_failed", f"the update failed, its groups are dropped: {refusal}") from None
        after.weights = await self._published(after)
        rewards = [cast(float, sample.reward) for group in batch for sample in group.samples]
        after.last_update = {
            "version": after.version,
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "loss": gradient.metrics["loss:sum"],
            "staleness/mean": statistics.fmean(run.version - group.version for group in batch),
            "groups": len(batch),
            "tokens": sum(len(sample.token_ids) for group in batch for sample in group.samples),
            "seconds": time.monotonic() - began,
            **{name: float(value) for name, value in (step.get("metrics") or {}).items()},
        }
        if after.version == run.settings.max_steps:
            after.state = "stopped"
        self._show(batch)
        await self._commit(after, batch, after.last_update)

    async def _published(self, run: Run) -> str:
        """Weights to sample from, of the model as it is now. Raises `DiskError` where they cannot be written.

        This has no key: where it failed or was interrupted, it is done again.
        """
        request = await self.service.save_for_sampler(run.model_id)
        try:
            return str((await self.service.wait(request))["sampling_session_id"])
        except Refusal as refusal:
            if refusal.status in (429, 503):
                raise
            raise DiskError(f"the weights of version {run.version} were not saved: {refusal}") from None

    async def _commit(self, after: Run, batch: Sequence[Group], update: Mapping[str, float]) -> None:
        """The run as it is after an update, and what has become of the groups, in one transaction."""
        gone = {group.number: Ended(group.n, []) for group in batch}
        for group in self.groups.values():
            if group.number not in gone and not group.complete and self._stale(after, group):
                open_ = [i for i, sample in enumerate(group.samples) if sample.reward is None]
                gone[group.number] = Ended(group.n, open_)

        stored = asdict(after)

        def change(db: Any) -> None:
            for number, ended in gone.items():
                put(db, SPACE, group_id(after.id, number), asdict(ended))
            if update:
                put(db, HISTORY, str(after.version), dict(update))
                put(db, HISTORY, str(after.version - MOST_HISTORY), None)
            put(db, SPACE, CURRENT, stored)

        await asyncio.wrap_future(self.service.store.write(change))
        self.run = after
        for number in gone:
            del self.groups[number]
        if update:
            self.history.append(dict(update))

    async def keep(self, run: Run) -> None:
        """Make this the run, in the journal first."""
        await self.service.store.put(SPACE, CURRENT, asdict(run))
        self.run = run

    def count(self, what: str) -> None:
        """Count an answer of grpo_server's endpoints."""
        if self.run:
            self.run.served[what] = self.run.served.get(what, 0) + 1

    def _show(self, batch: Sequence[Group]) -> None:
        """Remember the best and the worst of a group for the page."""
        ranked = sorted(batch[-1].samples, key=lambda sample: cast(float, sample.reward))
        for sample in {id(s): s for s in (ranked[0], ranked[-1])}.values():
            shown = {"prompt": batch[-1].prompt, "completion": sample.text, "reward": sample.reward}
            self.shown.append(shown | {"version": batch[-1].version})
