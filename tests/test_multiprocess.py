"""Environments spread over processes give what one process gives."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np

import tests._multiprocess_worker as worker

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 50
# What jax says when someone else was faster to take the port.
PORT_TAKEN = ("already in use", "Failed to start", "Failed to bind")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_workers(num_processes, folder, deadline):
    """What each process printed.

    Raises:
      AssertionError: a process failed or did not finish, with the output of all.
    """
    coordinator = f"127.0.0.1:{free_port()}"
    # The simulated devices of this process, and proxies between loopback ends, are none
    # of theirs. One thread each: two cores serve other tests too.
    env = {
        name: value
        for name, value in os.environ.items()
        if name.lower() not in ("xla_flags", "http_proxy", "https_proxy", "all_proxy")
    }
    env.update(JAX_PLATFORMS="cpu", OMP_NUM_THREADS="1")
    processes, files = [], []
    try:
        for process_id in range(num_processes):
            # Files, not pipes: a process that fills a pipe waits for its reader.
            out = (folder / f"{num_processes}-{process_id}.out").open("w+")
            err = (folder / f"{num_processes}-{process_id}.err").open("w+")
            files.append((out, err))
            command = [sys.executable, "-m", "tests._multiprocess_worker"]
            command += [coordinator, str(num_processes), str(process_id)]
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)
            )
        while any(process.poll() is None for process in processes):
            # One that failed leaves the other waiting for it.
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        texts = []
        for pair in files:
            for file in pair:
                file.seek(0)
            texts.append(tuple(file.read() for file in pair))
            for file in pair:
                file.close()
    codes = [process.returncode for process in processes]
    report = "\n".join(
        f"--- process {i}, exit status {code}\n{out}\n{err[-6000:]}"
        for i, (code, (out, err)) in enumerate(zip(codes, texts, strict=True))
    )
    assert codes == [0] * num_processes, f"of {num_processes} processes:\n{report}"
    return [json.loads(out.splitlines()[-1]) for out, _ in texts]


def test_environments_over_two_processes_train_as_one_process(tmp_path):
    deadline = time.monotonic() + TIMEOUT
    (alone,) = run_workers(1, tmp_path, deadline)
    try:
        results = run_workers(2, tmp_path, deadline)
    except AssertionError as error:
        if not any(text in str(error) for text in PORT_TAKEN):
            raise
        results = run_workers(2, tmp_path, deadline)

    assert [result["devices"] for result in results] == [4, 4]
    losses = np.concatenate([result["losses"] for result in results], axis=1)
    assert losses.shape == (worker.STEPS, worker.NUM_ENVS)
    np.testing.assert_allclose(losses, alone["losses"], rtol=1e-5)
    for result in results:
        for name in ("w", "b", "scale", "out"):
            # Counts are whole numbers: exact, whoever adds them.
            np.testing.assert_array_equal(
                result["sign_sum"][name], alone["sign_sum"][name]
            )
            np.testing.assert_allclose(
                result["params"][name], alone["params"][name], rtol=1e-5, atol=1e-6
            )
            np.testing.assert_allclose(
                result["trained"][name], alone["trained"][name], rtol=1e-4, atol=1e-5
            )
        np.testing.assert_array_equal(result["kept"], alone["kept"])
        np.testing.assert_allclose(
            result["gramians"], alone["gramians"], rtol=1e-4, atol=1e-5
        )
    # Processes that disagreed in the last bit would drift apart over a training.
    for name in ("params", "sign_sum", "kept", "trained", "gramians"):
        assert results[0][name] == results[1][name]
    # The mask has something to decide, and training gets somewhere.
    assert 0 < alone["kept"][0] < 1
    assert np.mean(alone["losses"][-1]) < np.mean(alone["losses"][0])
