"""Tiny real model folders and a recipe over rows of their own, for tests of whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import inprocess
import pytest
from toy_sequence import write_rows, write_tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("toy-llama")
    size = write_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=3,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, llama) -> Path:
    """Three tasks of 40 rows whose labels collide."""
    folder = tmp_path_factory.mktemp("rows")
    path = folder / "toy.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "toy",
                "tasks": write_rows(folder),
                "model": {"path": str(llama)},
                "method": {"kind": "ewc_lora", "lambda": 100.0},
                "adapter": {"rank": 4, "alpha": 8, "targets": "all_linear"},
                "data": {"format": "files", "max_source_tokens": 64, "max_target_tokens": 8},
                "train": {"learning_rate": 0.01, "global_batch_size": 8, "max_steps": 24},
                "engine": {"procs": 2, "zero_stage": 2, "device": "cpu", "timeout_s": 120},
                "checkpoint": {"every_steps": 5},
                "log": {"console": "plain"},
            }
        )
    )
    return path


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    return {
        **os.environ,
        "ACCRETE_CACHE": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def accrete(environment):
    """Run the command line; returns the finished process."""

    def call(*arguments: object, check: bool = True, **options) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "accrete.launch.cli", *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            **options,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def accrete_here(environment):
    """The same inside this process; runs must be plain ones on one CPU process."""

    def call(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
        done = inprocess.call(*arguments, ACCRETE_CACHE=environment["ACCRETE_CACHE"])
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def whole(accrete, recipe, tmp_path_factory) -> Path:
    """One uninterrupted run, shared by many tests; nothing may write into it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    accrete("run", recipe, "--run-dir", folder)
    return folder
