"""A Celery application with a broker in a folder, so that a real worker needs no server. The environment says where everything is."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery, chain

from metered_ai import MeteredOpenAI, connect
from metered_ai.integrations.celery import carry_billing

FOLDER = Path(os.environ["SHOP_FOLDER"])
ASK = {"model": "gpt-5-mini", "input": "Hi"}

for name in ("queue", "processed", "results"):
    (FOLDER / name).mkdir(exist_ok=True)

app = Celery("shop", broker="filesystem://", backend=f"file://{FOLDER / 'results'}")
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(FOLDER / "queue"),
        "data_folder_out": str(FOLDER / "queue"),
        "processed_folder": str(FOLDER / "processed"),
        "store_processed": True,
        "control_folder": str(FOLDER / "control"),
    },
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)
carry_billing()
client = MeteredOpenAI(
    billing=connect(f"sqlite:///{FOLDER / 'credits.db'}", on_repeat=os.environ.get("SHOP_ON_REPEAT", "free")),
    max_retries=0,
)


@app.task
def ask():
    return client.responses.create(**ASK).output_text


@app.task(bind=True, max_retries=3)
def ask_twice_and_fail_first(self):
    texts = [client.responses.create(**ASK).output_text for _ in range(1 + self.request.retries)]
    if not self.request.retries:
        raise self.retry(exc=RuntimeError("the first time fails"), countdown=0)
    return texts


@app.task
def ask_and_send():
    ask.delay()
    return client.responses.create(**ASK).output_text


@app.task
def of_chain(_=None):
    return client.responses.create(**ASK).output_text


def send_chain():
    return chain(of_chain.s(), of_chain.s()).delay()
