"""vLLM's processes sleep while they wait for one another: on its own queue, between two real processes."""

import os
import subprocess
import sys
from pathlib import Path

from tests.stack import PROJECT

PROGRAM = """
import multiprocessing, sys, time, psutil, zmq

def read(handle, module, told):
    if module:
        __import__(module)
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    queue = MessageQueue.create_from_handle(handle, 0)
    queue.wait_until_ready()
    queue.dequeue()
    told.send(psutil.Process().cpu_times().user + psutil.Process().cpu_times().system)
    queue.dequeue()
    told.send(psutil.Process().cpu_times().user + psutil.Process().cpu_times().system)

if __name__ == "__main__":
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    queue = MessageQueue(1, 1)
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    reader = context.Process(target=read, args=(queue.export_handle(), sys.argv[1], there))
    reader.start()
    queue.wait_until_ready()
    time.sleep(1.5)
    queue.enqueue("one")
    before = here.recv()
    time.sleep(0.8)
    queue.enqueue("two")
    print("spun", here.recv() - before)
    reader.join()
"""


def _seconds_spun(tmp_path: Path, module: str) -> float:
    script = tmp_path / "queue_of_two.py"
    script.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    argv = [sys.executable, str(script), module]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.split("spun")[1])


def test_a_reader_sleeps_between_two_messages(tmp_path: Path) -> None:
    # Given a reader of vLLM's queue whose last message was a moment ago
    # When it waits for the next one
    # Then it sleeps, where vLLM's own spins
    assert 2 * _seconds_spun(tmp_path, "workers.waiting") < _seconds_spun(tmp_path, "")
