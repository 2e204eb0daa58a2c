"""The life of a run: rent a pod, start the job, follow it, fetch its results, delete the pod.

Read `Launcher.run` first. The work happens in a task that signals may cancel at any point; what follows it, `_clear`,
is never cancelled, and does not ask what happened: it deletes by id what is on record, and by name what is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError, DiskError, Interrupted, LaunchError
from grpo_gsm8k.launch import job, records
from grpo_gsm8k.launch.api import DEAD, GONE, ApiError, Offer, Pod, Refused, Runpod, Unsure, connect
from grpo_gsm8k.launch.archive import Limits
from grpo_gsm8k.launch.fetch import Fetch, named
from grpo_gsm8k.launch.records import Blot, Lease, Record
from grpo_gsm8k.launch.settings import PREFERENCE, UpConfig
from grpo_gsm8k.launch.shell import (
    PIECE,
    Shell,
    ShellError,
    check_fetch,
    dial,
    make_key,
    own_keys,
    public_half,
    start_script,
)
from grpo_gsm8k.launch.webhook import Webhook
from grpo_gsm8k.runs.clean import printable, without_paths
from grpo_gsm8k.runs.progress import say

LEAST_S = 60.0  # a pod that the budget pays for less than this is not worth making
MOST_HOURS = 24.0
KEY = "id_ed25519"
CREATES = 3  # attempts at one GPU when replies are lost
FETCHES = 3  # rounds in a row that bring nothing, from a pod that answers
FETCH_WAIT_S = 60.0  # longest wait between two of them
KEY_LOOKS = 3  # with --insecure_host_key: questions for the host key before the one that is shown is believed
ALSO = {"NVIDIA H100 80GB HBM3": "sxm"}  # words that the provider's name of a GPU leaves out
SHOWN = {"create": "setup", "boot": "setup", "run": "train"}  # stages as events name them
TAIL = 2000  # characters of the log that tell of a failure
METRICS = {"reward": "reward/mean", "accuracy": "val/accuracy"}
WATCHDOG = "python -m grpo_gsm8k.launch.watchdog"


class BootError(LaunchError):
    """A pod that did not come up in time; another GPU may do."""


class NoHostKeyError(ShellError):
    """Nothing tells which host should answer."""


class PodLostError(LaunchError):
    """A pod that was there and is no more."""


class TimeUpError(LaunchError):
    """The budget or the hours are used up."""


def up(values: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """Run `command` on a rented pod; returns what the command line prints.

    Raises:
        ConfigError: before anything was rented.
        LaunchError: the job failed, or there was no machine for it. No pod is left.
        Interrupted: a signal came. No pod is left.
    """
    cfg, command = prepared(config.build(UpConfig, values), command)
    cfg = job.with_memory(cfg, command)
    if cfg.repo_id:
        from grpo_gsm8k.launch import hub  # its client takes half a second to load

        hub.check_push(cfg.repo_id, cfg.public)
        say(
            f"--repo_id {cfg.repo_id}: all of {cfg.fetch or 'artifacts'}/ is pushed there, but for what looks secret; "
            "a job that ends well leaves its model there instead"
        )
    deadline = time.time() + (cfg.hours or MOST_HOURS) * 3600
    settings = {name: value for name, value in vars(cfg).items() if name != "webhook"}  # its URL is a secret
    record = Record(records.new_run(cfg.name), command, cfg.budget, deadline, settings)
    records.begin(record, Path(cfg.state_dir))
    return launch(record, cfg)


def launch(record: Record, cfg: UpConfig) -> dict[str, Any]:
    """Begin or go on with a run on record."""
    blot = Blot(records.secrets_of(cfg.pass_env) | {"webhook": cfg.webhook})

    async def go() -> dict[str, Any]:
        async with connect(blot, cfg.backoff_s) as api:
            return await Launcher(record, cfg, api, blot).run()

    with records.hold(record.folder):
        return asyncio.run(go())


def prepared(cfg: UpConfig, command: Sequence[str]) -> tuple[UpConfig, list[str]]:
    """The settings with what was left to this program, and the whole command.

    Raises:
        ConfigError: something cannot work or would leak. Neither the hub nor the provider was asked for anything.
    """
    command = job.job_of(cfg, command)
    cfg = job.with_secrets(job.with_image(cfg, command))
    if not cfg.budget > 0:
        raise ConfigError("--budget is needed: the dollars that this run may cost at most")
    check_fetch(cfg.fetch)
    own_keys()
    for name, value in records.secrets_of(cfg.pass_env).items():
        if len(value) >= records.SECRET_LENGTH and any(value in word for word in command):
            raise ConfigError(f"the command holds the value of {name}: give it to the job with --pass_env {name}")
    return cfg, command


def ranked(offers: Sequence[Offer], cfg: UpConfig) -> list[Offer]:
    """The GPUs to try, in order of preference. Raises `ConfigError` if none is in the catalog."""
    known = {offer.gpu: offer for offer in offers}
    wanted = [gpu_called(name, known) for name in records.names_in(cfg.gpu)] or list(PREFERENCE)
    fitting = [
        known[name]
        for name in wanted
        if name in known and known[name].memory >= cfg.min_memory and known[name].most >= cfg.count
    ]
    if not fitting:
        raise ConfigError(
            f"the catalog has no {' or '.join(wanted)} x{cfg.count} with {cfg.min_memory:g} GiB; "
            f"it has {', '.join(sorted(known)) or 'nothing'}"
        )
    return fitting


def gpu_called(name: str, known: Iterable[str]) -> str:
    """The provider's id of a GPU, also by a short name: L40S, A100 SXM, H100 SXM. Any other as it is."""

    def fits(gpu: str) -> bool:
        parts = re.split(r"[ -]", f"{ALSO.get(gpu, '')} {gpu}".lower())
        return all(any(part.startswith(word) for part in parts) for word in name.lower().split())

    found = [gpu for gpu in known if fits(gpu)]
    return name if name in known or len(found) != 1 else found[0]


class Launcher:
    """One run and its pods."""

    def __init__(self, record: Record, cfg: UpConfig, api: Runpod, blot: Blot) -> None:
        self.record, self.cfg, self.api, self.blot = record, cfg, api, blot
        url = cfg.webhook or os.environ.get("GRPO_GSM8K_WEBHOOK", "")
        secret = os.environ.get("GRPO_GSM8K_WEBHOOK_SECRET", "")
        places = [(cfg.webhook_form, url), ("discord", os.environ.get("DISCORD_WEBHOOK_URL", ""))]
        self.hooks = [Webhook(url, form, secret, cfg.repo_id, cfg.backoff_s) for form, url in places if url]
        self.cap = record.began + (cfg.hours or MOST_HOURS) * 3600
        self.fetch: Fetch | None = None
        self._log_fault = False
        self._creating: asyncio.Future[Pod] | None = None
        self._unsure = any(not lease.pod_id and not lease.ended for lease in record.leases)
        self._offset, self._step = 0, -1

    async def run(self) -> dict[str, Any]:
        """Everything, and then the end: whatever happened, no pod is left, or the user is told which."""
        work = asyncio.create_task(self._work())
        caught: list[signal.Signals] = []
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled, number, work, caught)
        try:
            await asyncio.wait({work})
        finally:
            left = await self._clear()
            bill = self._close(left)
        fault = None if work.cancelled() else work.exception()
        if fault or self.record.exit_code:
            what = str(fault) if fault else f"the job ended with exit code {self.record.exit_code}"
            self._tell("error", what, quiet=True, tail=self._tail())
        self._tell("end", bill, cost=self.record.cost())
        await asyncio.gather(*(hook.close() for hook in self.hooks))
        for hook in self.hooks:
            if hook.dropped:
                self.say(f"{hook.dropped} webhook events could not be delivered ({hook.fault})")
        if caught:
            raise Interrupted(f"{caught[0].name}: the run was ended", 128 + caught[0])
        if fault:
            raise fault
        if left:
            raise LaunchError(f"{', '.join(left)} could not be deleted")
        problem = self.fetch.problem() if self.fetch else ""
        if self.record.exit_code:
            more = f"; {problem}" if problem else ""
            raise LaunchError(f"the job ended with exit code {self.record.exit_code}; its log: {self._log}{more}")
        if problem:
            raise LaunchError(f"the job ended with exit code 0, but {problem}")
        return self._summary()

    # ------------------------------------------------------------------------------------------------- the work

    async def _work(self) -> None:
        """Pod after pod, until a job has ended."""
        attached = self.record.stage in ("run", "fetch")
        if not attached:
            await self._clear_or_stop()
        for attempt in itertools.count():
            try:
                await self._follow(await (self._again() if attached else self._rent()))
            except PodLostError as fault:
                if not self.cfg.repo_id or attempt >= self.cfg.restarts:
                    more = "" if self.cfg.repo_id else "; with --repo_id it would go on from its last checkpoint"
                    raise LaunchError(f"{fault}{more}") from None
                self._tell("lost", f"{fault}; a new pod will go on from the last pushed checkpoint")
                await self._clear_or_stop()
                attached = False
            else:
                return

    async def _rent(self) -> Shell:
        """A pod that answers by ssh: the GPUs in order, several rounds."""
        for number in range(self.cfg.rounds):
            if number:
                await asyncio.sleep(self.cfg.round_s * 2 ** (number - 1))
            for offer in self._paid(ranked(await self.api.offers(self.cfg.cloud, self.cfg.count), self.cfg)):
                try:
                    await self._create(offer)
                    return await self._boot()
                except (Refused, BootError) as fault:
                    self._tell("refused", f"{offer.gpu}: {fault}")
                    await self._clear_or_stop()
        raise LaunchError(f"no GPU could be had in {self.cfg.rounds} rounds")

    def _paid(self, offers: Sequence[Offer]) -> list[Offer]:
        """Those whose price x time the budget has left: for all of --hours, or for a start where none are given."""
        hours = (self.cap - time.time()) / 3600 if self.cfg.hours else LEAST_S / 3600
        left = self.record.budget - self.record.cost()
        found = [offer for offer in offers if offer.price * self.cfg.count * hours <= left]
        if not found:
            cheapest = min(offer.price for offer in offers) * self.cfg.count
            raise ConfigError(
                f"--budget has ${left:.2f} left, and {hours:.2g} hours cost ${cheapest * hours:.2f} "
                f"at the lowest price, ${cheapest:.2f} an hour"
            )
        return found

    async def _create(self, offer: Offer) -> None:
        """Make the pod, once, whatever becomes of the replies. The record is on the disk before the request is sent."""
        record, rate = self.record, offer.price * self.cfg.count
        record.deadline = min(self.cap, time.time() + (record.budget - record.cost()) / rate * 3600)
        if record.deadline - time.time() < LEAST_S:
            raise LaunchError(f"the {self.cfg.hours or MOST_HOURS:g} hours are used up")
        name = records.pod_name(record.run, record.deadline)
        key = record.folder / KEY
        public = public_half(key) if key.exists() else make_key(key, record.run)
        lease = Lease("", offer.gpu, rate, time.time())
        record.leases.append(lease)
        record.host_key = ""  # that was another host's
        record.enter("create")
        self._tell("create", f"asking for {self.cfg.count} x {offer.gpu} at ${rate:.2f} an hour")
        for _ in range(CREATES):
            pod: Pod | None
            try:
                pod = await self._create_once(body(self.cfg, offer, name, public, record.deadline))
            except Unsure as fault:
                self.say(f"{fault}; looking for {name} by its name")
                pod = await self._adopt(name)
            except ApiError:
                if not self._unsure:  # certainly nothing was made
                    record.leases.remove(lease)
                    record.save()
                raise
            if pod:
                lease.pod_id, lease.rate = pod.id, max(rate, pod.rate)
                record.enter("boot")
                return
        raise Refused(f"no clear answer in {CREATES} attempts")

    async def _create_once(self, wanted: Mapping[str, Any]) -> Pod:
        """One request, that a signal does not cut off: its pod must be known to be deleted."""
        before, self._unsure = self._unsure, True
        self._creating = asyncio.ensure_future(self.api.create(wanted))
        try:
            pod = await asyncio.shield(self._creating)
        except Unsure:
            raise
        except ApiError:
            self._unsure = before
            raise
        self._unsure = before
        return pod

    async def _adopt(self, name: str) -> Pod | None:
        """The pod that a lost reply was about, if it was made; the list may be late, so it is asked twice."""
        for _ in range(2):
            await asyncio.sleep(self.cfg.poll_s)
            found = [pod for pod in await self.api.pods() if pod.name == name and pod.status not in DEAD]
            for twin in found[1:]:
                await self.api.delete(twin.id)
            if found:
                return found[0]
        return None

    async def _boot(self) -> Shell:
        """Wait for ssh, with a deadline for each state."""
        cfg, pod_id = self.cfg, self.record.lease().pod_id
        limits = {"PROVISIONING": cfg.place_s, "STARTING": cfg.pull_s, "RUNNING": cfg.ssh_s}
        state, since, looks, trouble, unknown = "PROVISIONING", time.monotonic(), 0, "", False
        while True:
            pod = await self._pod(pod_id)
            if pod and pod.status in DEAD:
                raise BootError(f"the pod is {pod.status}")
            if pod and pod.status != state:
                state, since = pod.status, time.monotonic()
                self._tell("state", f"pod {pod_id} is {state}")
            if pod and pod.ssh and state == "RUNNING":
                looks += 1
                try:
                    return await self._dial(pod, looks)
                except NoHostKeyError as fault:
                    unknown, trouble = True, f": {fault}"
                except ShellError as fault:
                    unknown, trouble = False, f": {fault}"
            if unknown and time.monotonic() - since >= cfg.ssh_s:  # the image's fault: another GPU would not help
                raise LaunchError(
                    f"the container's log shows no ssh host key after {cfg.ssh_s:g} s, so nobody knows who answers at "
                    "its address: use an image that prints its ed25519 key, as entrypoint.sh does, or let the secrets "
                    "go to whoever answers with --insecure_host_key"
                )
            if time.monotonic() - since >= limits.get(state, cfg.place_s):
                raise BootError(f"still {state} after {limits.get(state, cfg.place_s):g} s{trouble}")
            if time.time() >= self.record.deadline:
                raise TimeUpError("the budget or the time was used up before the job began")
            await asyncio.sleep(cfg.poll_s)

    async def _pod(self, pod_id: str) -> Pod | None:
        """The pod; None also while the API does not answer, which is no news about the pod."""
        try:
            return await self.api.pod(pod_id)
        except ApiError as fault:
            self.say(str(fault))
            return None

    async def _dial(self, pod: Pod, looks: int) -> Shell:
        """Connect to a host whose key is known: from the container's log, or from the first time."""
        assert pod.ssh
        key = self.record.folder / KEY
        host_key = await self.api.host_key(pod.id, public_half(key)) or self.record.host_key
        if not host_key and not (self.cfg.insecure_host_key and looks >= KEY_LOOKS):
            raise NoHostKeyError("the container's log shows no ssh host key yet")
        shell = await dial(pod.ssh, key, host_key, self.cfg.ssh_s)
        if not host_key:
            self.say("the container's log shows no ssh host key: the one that the host has shown is pinned from now on")
        if self.record.host_key != shell.host_key:
            self.record.host_key = shell.host_key
            self._keep_record()
            if own_keys():
                host, port, user = pod.ssh
                self.say(f"your own key may log in, too: ssh -p {port} {user}@{host}")
        return shell

    async def _again(self) -> Shell:
        """Connect anew: the pod may have another address, or be gone."""
        pod_id, until, absent = self.record.lease().pod_id, time.monotonic() + self.cfg.ssh_s, 0
        while True:
            pod = await self._pod(pod_id)
            absent = 0 if pod else absent + 1
            if (pod and pod.status in DEAD) or (absent > 1 and await self._vanished(pod_id)):
                raise PodLostError(f"pod {pod_id} is {pod.status if pod else 'gone'}")
            if pod and pod.ssh:
                with contextlib.suppress(ShellError):
                    return await self._dial(pod, KEY_LOOKS)
            if time.monotonic() >= until and pod:
                raise PodLostError(f"pod {pod_id} has not answered by ssh for {self.cfg.ssh_s:g} s")
            if time.time() >= self.record.deadline:
                raise TimeUpError("the deadline has passed, and the pod cannot be reached")
            await asyncio.sleep(self.cfg.poll_s)

    async def _vanished(self, pod_id: str) -> bool:
        """Whether the API answers, and its list does not have the pod."""
        try:
            return all(pod.id != pod_id for pod in await self.api.pods())
        except ApiError:
            return False

    # ------------------------------------------------------------------------------------------------- the job

    async def _follow(self, shell: Shell) -> None:
        """Start the job (once), show its log until it ends or its time is up, and fetch what it made."""
        env = records.environment(records.names_in(self.cfg.pass_env))
        script = start_script(wrapped(self.cfg, self.record.command), env)
        self._stage("run")
        self._offset = 0
        self._tell("run", f"the job runs; its log is kept in {self._log}")
        self._keep_log("", "w")
        shell, _ = await self._ask(shell, lambda s: s.start(script))
        try:
            shell = await self._until_it_ends(shell)
        except TimeUpError as fault:
            shell, _ = await self._ask(shell, lambda s: s.stop("TERM"))
            self._tell("stop", f"{fault}; the job was told to stop")
            shell = await self._until_it_stops(shell)
            await self._fetch(shell)
            raise
        await self._fetch(shell)

    async def _ask(self, shell: Shell, what: Callable[[Shell], Coroutine[Any, Any, Any]]) -> tuple[Shell, Any]:
        """Do something over ssh, on a new connection when this one drops."""
        while True:
            try:
                return shell, await what(shell)
            except ShellError as fault:
                self.say(f"{fault}; the job goes on, connecting again")
                shell.close()
                shell = await self._again()

    async def _until_it_ends(self, shell: Shell) -> Shell:
        while True:
            shell, ended = await self._look(shell)
            if ended:
                return shell
            if time.time() >= self._stop_at:
                raise TimeUpError(f"${self.record.cost():.2f} of ${self.record.budget:g} are spent or the time is up")
            await asyncio.sleep(self.cfg.poll_s)

    async def _until_it_stops(self, shell: Shell) -> Shell:
        until = min(self.record.deadline, time.time() + self._reserve / 2)
        while time.time() < until:
            shell, ended = await self._look(shell)
            if ended:
                return shell
            await asyncio.sleep(self.cfg.poll_s)
        shell, _ = await self._ask(shell, lambda s: s.stop("KILL"))
        return shell

    async def _look(self, shell: Shell) -> tuple[Shell, bool]:
        """Show what is new; whether the job has ended. All of its log is shown before it counts as ended."""
        shell, look = await self._ask(shell, lambda s: s.look(self._offset))
        if look.lost:
            shell.close()
            raise PodLostError("the container was started again, and the job is gone")
        log = look.log
        if look.exit_code is None or len(log) == PIECE:  # whole lines, so that no secret is cut in two and missed
            log = log[: log.rfind(b"\n") + 1] or (log if len(log) == PIECE else b"")
        self._offset += len(log)
        self._show(log)
        step = look.metrics.get("step")
        if isinstance(step, int) and step != self._step:
            self._step = step
            known = {name: look.metrics[key] for name, key in METRICS.items() if key in look.metrics}
            self._tell("step", f"step {step}", quiet=True, step=step, cost=self.record.cost(), **known)
        if look.exit_code is None or log:
            return shell, False
        self.record.exit_code = look.exit_code
        self._keep_record()
        return shell, True

    @property
    def _reserve(self) -> float:
        """Seconds kept for stopping, fetching and deleting: at most a fifth of what there is."""
        return min(self.cfg.fetch_s, (self.record.deadline - self.record.lease().began) / 5)

    @property
    def _stop_at(self) -> float:
        """When the job must stop, so that its results can still be fetched within the budget."""
        lease = self.record.lease()
        spent_before = self.record.cost() - lease.cost(time.time())
        paid_until = lease.began + (self.record.budget - spent_before) / max(lease.rate, 1e-9) * 3600
        return min(self.record.deadline, paid_until) - self._reserve

    async def _fetch(self, shell: Shell | None) -> None:
        """Bring the results home. What cannot be brought is named, and makes the run fail; the end comes all the same.

        The pod lives until everything is here, or the pod's deadline has come, or --fetch_s have passed without a file.
        """
        self._stage("fetch")
        limits = Limits(self.cfg.fetch_files, int(self.cfg.fetch_file_gb * 1e9), int(self.cfg.fetch_gb * 1e9))
        fetch = Fetch(self.record.folder / "results", limits)
        if self.cfg.fetch:
            self.fetch = fetch
            try:
                async with asyncio.timeout(max(1.0, self.record.deadline - time.time())):
                    await self._bring_home(shell, fetch)
            except TimeoutError:
                fetch.fault = "the pod's deadline came first"
            except (PodLostError, TimeUpError, LaunchError) as fault:
                fetch.fault = str(fault)
            if fetch.others:
                self._tell("fetch", f"skipped: {named(fetch.others)}")
            problem = fetch.problem()
            nothing = "" if fetch.promised else f" (the job has left nothing at {self.cfg.fetch})"
            self._tell("fetch", f"INCOMPLETE: {problem}" if problem else f"results: {fetch.into}{nothing}")

    async def _bring_home(self, shell: Shell | None, fetch: Fetch) -> None:
        """Round after round, on a new connection where one drops."""
        until, wait, here, idle = time.time() + self.cfg.fetch_s, self.cfg.poll_s, -1, 0
        while True:
            dropped = False
            try:
                shell = shell or await self._again()
                await fetch.round(shell, self.cfg.fetch)
            except ShellError as fault:
                fetch.fault, dropped = str(fault), True
                if shell:
                    shell.close()
                shell = None
            except DiskError as fault:
                fetch.fault, dropped = str(fault), True
            missing = fetch.missing()
            if fetch.listed and not missing and not fetch.fault:
                break
            now_here = len(fetch.promised) - len(missing)
            idle = 0 if dropped or now_here > here else idle + 1
            if now_here > here:
                until, wait, here = time.time() + self.cfg.fetch_s, self.cfg.poll_s, now_here
            if idle >= FETCHES or time.time() + wait >= until:
                break
            why = fetch.fault or "the pod did not send everything"
            self.say(f"{why}; {len(missing)} of {len(fetch.promised)} files are missing, asking again in {wait:.3g} s")
            await asyncio.sleep(wait)
            wait = min(2 * wait, FETCH_WAIT_S)
        if shell:
            shell.close()

    def _show(self, log: bytes) -> None:
        if log:
            text = printable(self.blot(log.decode("utf-8", "replace")))
            self._keep_log(text)
            self.say("\n".join(f"[train] {line}" for line in text.rstrip("\n").split("\n")))

    def _tail(self) -> str:
        """The end of the log, as far as it was kept."""
        try:
            return without_paths(self._log.read_text(encoding="utf-8")[-TAIL:])
        except OSError:
            return ""

    def _keep_log(self, text: str, mode: Literal["a", "w"] = "a") -> None:
        """A full disk costs lines of the log, never the run."""
        try:
            with self._log.open(mode, encoding="utf-8") as handle:
                handle.write(text)
        except OSError as fault:
            if not self._log_fault:
                self.say(f"{self._log}: cannot be written ({fault.strerror}); lines of the log are lost here")
            self._log_fault = True

    def _stage(self, stage: str) -> None:
        """Note the stage of a job that runs: a full disk here must not end it."""
        self.record.stage = stage
        self._keep_record()

    # ------------------------------------------------------------------------------------------------- the end

    async def _clear_or_stop(self) -> None:
        """Before the next pod is made the last one must be gone: two at once would be beyond the budget."""
        if left := await self._clear():
            raise LaunchError(f"{', '.join(left)} could not be deleted, so no other pod was made")

    async def _clear(self) -> list[str]:
        """Delete every pod of this run; returns those that could not be seen to be gone."""
        leases, known = [lease for lease in self.record.leases if not lease.ended], set[str]()
        if self._creating:
            await asyncio.wait({self._creating}, timeout=90.0)
            if self._creating.done() and not self._creating.exception():
                known.add(self._creating.result().id)
        if not leases:
            return []
        left = await bury(
            self.api,
            lambda pod: pod.name.startswith(self.record.prefix),
            known | {lease.pod_id for lease in leases if lease.pod_id},
            looks=1 + self._unsure,
            patience_s=self.cfg.delete_s,
            poll_s=self.cfg.poll_s,
            say=self.say,
        )
        if left is None:
            return [f"{self.record.prefix}*"]
        if not left:
            self._unsure = False
            for lease in leases:
                lease.ended = time.time()
            self._keep_record()
        return sorted(left)

    def _keep_record(self) -> None:
        try:
            self.record.save()
        except DiskError as fault:
            self.say(str(fault))

    def _close(self, left: list[str]) -> str:
        """The last words: what it cost, and what is left of it."""
        cost = f"it cost about ${self.record.cost():.4f} (price x time)"
        if left:
            bill = f"{cost}, AND MAY GO ON COSTING: {', '.join(left)} could not be deleted; `grpo-gsm8k launch reap`"
        else:
            self.record.stage = "end"
            self._keep_record()
            (self.record.folder / KEY).unlink(missing_ok=True)
            bill = f"{cost}, no pod is left"
        return bill

    def _summary(self) -> dict[str, Any]:
        folder = self.record.folder
        return {
            "run": self.record.run,
            "exit_code": self.record.exit_code,
            "cost": round(self.record.cost(), 4),
            "pods": [lease.pod_id for lease in self.record.leases],
            "gpu": self.record.lease().gpu,
            "seconds": round(time.time() - self.record.began, 1),
            "log": str(self._log),
            "results": str(folder / "results") if self.fetch else "",
            "files": len(self.fetch.promised) if self.fetch else 0,
            "skipped": sorted(self.fetch.others) if self.fetch else [],
        }

    def _signalled(self, number: signal.Signals, work: asyncio.Task[None], caught: list[signal.Signals]) -> None:
        if caught or work.done():
            self.say("the pod is being deleted; a moment")
        else:
            self.say(f"{number.name}: ending the run and deleting its pod")
        if not caught and not work.done():
            caught.append(number)
            work.cancel()

    @property
    def _log(self) -> Path:
        return self.record.folder / "log"

    def say(self, message: str) -> None:
        """A line for the user; a terminal that is gone must not keep a pod alive."""
        with contextlib.suppress(OSError):
            say(self.blot(message))

    def _tell(self, event: str, message: str, quiet: bool = False, **known: float | str) -> None:
        message, stage = self.blot(message), SHOWN.get(self.record.stage, self.record.stage)
        for hook in self.hooks:
            hook.tell(event, without_paths(printable(message)), stage, **known)
        if not quiet:
            self.say(message)


async def bury(
    api: Runpod,
    ours: Callable[[Pod], bool],
    known: set[str],
    *,
    looks: int,
    patience_s: float,
    poll_s: float,
    say: Callable[[str], None],
) -> set[str] | None:
    """Delete pods until they are seen to be gone.

    Args:
        ours: whether a pod on the list is one of them.
        known: ids of those that were seen before; the list may miss them, so each is asked for as well.
        looks: how often in a row nothing may be found. A pod whose reply was lost may turn up late.

    Returns:
        Ids that were still there when `patience_s` was over; None when the API gave no answer at all.
    """
    until, clean, there = time.monotonic() + patience_s, 0, set(known)
    answered = False
    while True:
        try:
            for pod_id in there:
                await api.delete(pod_id)
            there = {pod.id for pod in await api.pods() if ours(pod)}
            for pod_id in known - there:
                pod = await api.pod(pod_id)
                there |= {pod_id} if pod and pod.status not in GONE else set()
            known, answered, clean = known | there, True, 0 if there else clean + 1
        except ApiError as fault:
            say(str(fault))
            clean, there = 0, there or set(known)
        if clean >= looks:
            return set()
        if time.monotonic() >= until:
            return there if answered or there else None
        await asyncio.sleep(poll_s)


def body(cfg: UpConfig, offer: Offer, name: str, public_key: str, deadline: float) -> dict[str, Any]:
    """The create request. Its environment is shown in the provider's console: no secret is in it."""
    env = {
        "PUBLIC_KEY": public_key,
        **({"SSH_PUBLIC_KEY": own} if (own := own_keys()) else {}),
        "GRPO_GSM8K_DEADLINE": str(int(deadline)),
        "GRPO_GSM8K_GRACE_S": f"{cfg.grace_s:g}",
        "GRPO_GSM8K_STALE_S": f"{cfg.stale_s:g}",
    }
    gpu: dict[str, Any] = {"id": offer.gpu, "count": cfg.count}
    wanted: dict[str, Any] = {"name": name, "image": cfg.image, "cloud": cfg.cloud, "disk": cfg.disk}
    wanted |= {"gpu": gpu | ({"minCudaVersion": cfg.min_cuda} if cfg.min_cuda else {})}
    wanted |= {"ports": ["22/tcp"], "env": env, "startSsh": True, "args": WATCHDOG}
    if cfg.registry:
        wanted["registry"] = cfg.registry
    if cfg.volume:
        wanted["mounts"] = {"network": [{"volumeId": cfg.volume, "path": "/workspace"}]}
    return wanted


def wrapped(cfg: UpConfig, command: Sequence[str]) -> list[str]:
    """The command, with checkpoints restored before it and pushed beside it where there is a repository."""
    if not cfg.repo_id:
        return list(command)
    keep = ["python", "-m", "grpo_gsm8k.launch.keep", "--repo_id", cfg.repo_id, "--every_s", f"{cfg.push_every_s:g}"]
    keep += ["--public"] if cfg.public else []
    return [*keep, "--folder", cfg.fetch or "artifacts", "--", *command]
