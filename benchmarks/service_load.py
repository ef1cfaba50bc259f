"""The service under load: 8 tenants, one with many small jobs, and clients that chat meanwhile.

    python benchmarks/service_load.py --base smollm2-135m-instruct --seconds 120 [--database postgresql+psycopg://...]

Prints jobs an hour, all created at once beside the same jobs one after another; chat's time to first token and time per
output token, idle and while jobs train; trained tokens a second, alone and beside the chats; Jain's index of trained
tokens between the tenants while all have work; and errors. API and worker are processes of their own, as `luthier serve
--no-workers` and `luthier worker`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai

NUM_TENANTS, NUM_CLIENTS = 8, 8
JOBS_OF_LARGEST = 20
WORDS = ["red", "green", "blue", "warm", "cold", "bright", "dim", "lamp", "door", "fan"]


def rows(num_rows: int, seed: int) -> bytes:
    draw = random.Random(seed)
    lines = []
    for _ in range(num_rows):
        words = draw.sample(WORDS, 3)
        turns = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": words[0]}]
        lines.append(json.dumps({"messages": turns}))
    return "\n".join(lines).encode()


class Chats:
    """Clients that chat one after another until told to stop."""

    def __init__(self, url: str, keys: list[str], model: str) -> None:
        self.first_seconds: list[float] = []
        self.token_seconds: list[float] = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._chat, args=(url, key, model, n)) for n, key in enumerate(keys)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _chat(self, url: str, key: str, model: str, number: int) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        draw = random.Random(number)
        while not self._stop.is_set():
            ask: Any = [{"role": "user", "content": "Name a colour like " + draw.choice(WORDS)}]
            started = time.perf_counter()
            times = []
            try:
                for _ in client.chat.completions.create(model=model, messages=ask, max_tokens=16, stream=True):
                    times.append(time.perf_counter())
            except openai.OpenAIError as error:
                self.errors.append(str(error)[:200])
                continue
            # The first chunk carries the role with the first text; the last one only the reason.
            self.first_seconds.append(times[0] - started)
            self.token_seconds += [b - a for a, b in itertools.pairwise(times)][:-1]
            self._stop.wait(draw.uniform(0.5, 1.5))

    def summary(self) -> dict[str, Any]:
        return {
            "replies": len(self.first_seconds),
            "first_token_s": _quantiles(self.first_seconds),
            "per_token_s": _quantiles(self.token_seconds),
            "errors": len(self.errors),
            "first_errors": self.errors[:3],
        }


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p95": round(cuts[94], 3), "max": round(max(values), 3)}


def trained(admin: openai.OpenAI) -> dict[str, int]:
    """Trained tokens by tenant."""
    totals: dict[str, int] = {}
    for row in admin.get("/luthier/admin/usage", cast_to=httpx.Response).json()["data"]:
        totals[row["tenant"]] = totals.get(row["tenant"], 0) + row["trained_tokens"]
    return totals


def measure(admin: openai.OpenAI, seconds: float) -> tuple[float, dict[str, int]]:
    """Trained tokens a second, and by tenant, over some time."""
    before, started = trained(admin), time.perf_counter()
    time.sleep(seconds)
    after, spent = trained(admin), time.perf_counter() - started
    gained = {tenant: after[tenant] - before.get(tenant, 0) for tenant in after if after[tenant]}
    return sum(gained.values()) / spent, gained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--database", default="")
    parser.add_argument("--step-tokens", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=JOBS_OF_LARGEST, help="of the largest tenant")
    parser.add_argument("--skip-jobs-an-hour", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), arguments)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"LUTHIER_DATA": str(folder), "LUTHIER_STEP_TOKENS": str(arguments.step_tokens)}
    if arguments.database:
        environment["LUTHIER_DATABASE_URL"] = arguments.database
    command = [sys.executable, "-m", "luthier.cli.main"]
    log = (folder / "log").open("wb")
    named = ["--base", arguments.base]
    api = subprocess.Popen(
        [*command, "serve", "--no-workers", "--port", str(port), *named],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
    )
    assert api.stdout is not None
    url, key = api.stdout.readline().split()[-1].removesuffix("/v1"), api.stdout.readline().split()[-1]
    jobs = ["--max-jobs", str(arguments.jobs + 2 * NUM_TENANTS)]
    worker = subprocess.Popen([*command, "worker", *named, *jobs], stdout=log, stderr=log, env=environment)
    try:
        report(url, key, arguments)
    finally:
        for process in (worker, api):
            process.send_signal(signal.SIGTERM)
            process.wait(90)
        log.close()


def shares(clients: list[openai.OpenAI], jobs_of_largest: int) -> list[tuple[openai.OpenAI, int]]:
    """Whose jobs there are, with a seed for each: many of the first tenant's, one or two of the others'."""
    counts = [jobs_of_largest if n == 0 else 1 + n % 2 for n in range(len(clients))]
    return [(client, seed) for client, count in zip(clients, counts, strict=True) for seed in range(count)]


def create(client: openai.OpenAI, base: str, seed: int, own: dict[str, Any]) -> tuple[openai.OpenAI, str]:
    file = client.files.create(file=("t.jsonl", rows(64, seed)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=base, training_file=file.id, extra_body={"luthier": own})
    return client, job.id


def wait(client: openai.OpenAI, job: str) -> None:
    while (status := client.fine_tuning.jobs.retrieve(job).status) != "succeeded":
        if status in ("failed", "cancelled"):
            raise SystemExit(f"{job} {status}")
        time.sleep(0.25)


def throughput(clients: list[openai.OpenAI], base: str, jobs_of_largest: int) -> dict[str, float]:
    """Jobs an hour, from the first create to the last end, of one epoch each; a job's uploads included."""
    own = {"train": {"epochs": 1.0, "batch_size": 4}, "method": {"type": "lora", "rank": 8}}
    asked = shares(clients, jobs_of_largest)
    found: dict[str, float] = {"jobs": len(asked)}
    started = time.perf_counter()
    for client, job in [create(client, base, seed, own) for client, seed in asked]:
        wait(client, job)
    found["together"] = round(3600 * len(asked) / (time.perf_counter() - started), 1)
    started = time.perf_counter()
    for client, seed in asked:
        wait(*create(client, base, seed, own))
    found["in_turn"] = round(3600 * len(asked) / (time.perf_counter() - started), 1)
    found["ratio"] = round(found["together"] / found["in_turn"], 2)
    return found


def report(url: str, key: str, arguments: argparse.Namespace) -> None:
    admin = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=3)
    base = arguments.base.partition("=")[0]
    keys = []
    for n in range(NUM_TENANTS):
        admin.post("/luthier/admin/tenants", cast_to=httpx.Response, body={"name": f"tenant-{n}"})
        made = admin.post(
            f"/luthier/admin/tenants/tenant-{n}/keys", cast_to=httpx.Response, body={"scopes": ["tune", "infer"]}
        )
        keys.append(made.json()["key"])
    admin.chat.completions.create(model=base, messages=[{"role": "user", "content": "Hello"}], max_tokens=2)
    clients = [openai.OpenAI(base_url=f"{url}/v1", api_key=tenant_key) for tenant_key in keys]
    if not arguments.skip_jobs_an_hour:
        print(json.dumps({"jobs_an_hour": throughput(clients, base, arguments.jobs)}), flush=True)
    chats = Chats(url, keys[:NUM_CLIENTS], base)
    time.sleep(arguments.seconds)
    chats.stop()
    print(json.dumps({"idle": chats.summary()}), flush=True)
    # So long that all have work for as long as is measured.
    own = {"train": {"epochs": 200.0, "checkpoint_every": 10_000}, "method": {"type": "lora", "rank": 8}}
    started = [create(client, base, seed, own) for client, seed in shares(clients, arguments.jobs)]
    while any(client.fine_tuning.jobs.retrieve(job).status != "running" for client, job in started):
        time.sleep(1.0)
    alone, gained_alone = measure(admin, arguments.seconds)
    chats = Chats(url, keys[:NUM_CLIENTS], base)
    beside, gained = measure(admin, arguments.seconds)
    chats.stop()
    values = list(gained.values())
    print(json.dumps({"training": chats.summary()}))
    print(
        json.dumps(
            {
                "trained_tokens_per_s_alone": round(alone, 1),
                "trained_tokens_per_s_beside_chat": round(beside, 1),
                "kept": round(beside / alone, 3) if alone else None,
                "jain_alone": round(_jain(list(gained_alone.values())), 4),
                "jain_beside_chat": round(_jain(values), 4),
            }
        )
    )


def _jain(values: list[int]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values)) if any(values) else 0.0


if __name__ == "__main__":
    main()
