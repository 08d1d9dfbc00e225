"""A plan in other tools' words: vLLM and SGLang commands, Kubernetes LeaderWorkerSets, a Dynamo graph, a PAI-EAS service.

Each export says what it could not carry over, so that nothing is lost silently.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

from twin.spec.cluster import ClusterSpec
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

VLLM_BACKENDS = {
    "deepep_normal": "deepep_high_throughput",
    "deepep_low_latency": "deepep_low_latency",
    "ag_rs": "allgather_reducescatter",
}
SGLANG_MODES = {"deepep_normal": "normal", "deepep_low_latency": "low_latency"}
DTYPES = {"fp8": "fp8", "fp8_block": "fp8", "fp4": "modelopt_fp4", "mxfp4": "mxfp4"}


def export(
    plan: Plan, model: ModelSpec, cluster: ClusterSpec, kind: str, *, image: str = "IMAGE", instance_type: str = ""
) -> str:
    """The plan as text in format `kind` (a key of FORMATS)."""
    return FORMATS[kind](plan, model, cluster, image, instance_type)


def vllm_arguments(plan: Plan, pool: PoolPlan) -> list[str]:
    """`vllm serve` arguments of one instance. vLLM has no EP flag: with it enabled, EP is DP x TP."""
    args = [
        "--tensor-parallel-size",
        str(pool.tp),
        "--data-parallel-size",
        str(pool.dp),
        "--max-num-seqs",
        str(pool.max_num_seqs),
        "--max-num-batched-tokens",
        str(pool.max_batch_tokens),
        "--block-size",
        str(pool.block_tokens),
        "--gpu-memory-utilization",
        f"{pool.memory_fraction:g}",
    ]
    if pool.ep > 1:
        args.append("--enable-expert-parallel")
        if pool.comm in VLLM_BACKENDS:
            args += ["--all2all-backend", VLLM_BACKENDS[pool.comm]]
    if pool.redundant_experts:
        args += ["--enable-eplb", "--eplb-config", json.dumps({"num_redundant_experts": pool.redundant_experts})]
    if pool.tbo:
        args += ["--enable-dbo", "--dbo-decode-token-threshold", str(pool.tbo_min_tokens)]
    if pool.mtp_draft_tokens:
        args += ["--speculative-config", json.dumps({"method": "deepseek_mtp", "num_speculative_tokens": pool.mtp_draft_tokens})]
    if plan.precision.kv == "fp8":
        args += ["--kv-cache-dtype", "fp8"]
    args.append("--enable-prefix-caching" if pool.prefix_cache else "--no-enable-prefix-caching")
    if not pool.cuda_graphs:
        args.append("--enforce-eager")
    if plan.separated:
        role = "kv_producer" if pool.role == "prefill" else "kv_consumer"
        args += ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": role})]
    return args


def sglang_arguments(plan: Plan, pool: PoolPlan) -> list[str]:
    """`sglang.launch_server` arguments of one instance. SGLang's --tp is the whole world; --dp-size cuts its attention."""
    args = [
        "--tp",
        str(pool.world),
        "--max-running-requests",
        str(pool.max_num_seqs * pool.dp),
        "--page-size",
        str(pool.block_tokens),
        "--chunked-prefill-size",
        str((pool.chunk_tokens or -1) * (pool.dp if pool.chunk_tokens else 1)),
        "--mem-fraction-static",
        f"{pool.memory_fraction:g}",
    ]
    if pool.dp > 1:
        args += ["--dp-size", str(pool.dp), "--enable-dp-attention"]
    if pool.ep > 1:
        args += ["--ep-size", str(pool.ep)]
        if pool.comm in SGLANG_MODES:
            args += ["--moe-a2a-backend", "deepep", "--deepep-mode", SGLANG_MODES[pool.comm]]
    if pool.redundant_experts:
        args += ["--enable-eplb", "--ep-num-redundant-experts", str(pool.redundant_experts)]
    if pool.tbo:
        args.append("--enable-two-batch-overlap")
    if pool.mtp_draft_tokens:
        args += [
            "--speculative-algorithm",
            "NEXTN",
            "--speculative-num-steps",
            str(pool.mtp_draft_tokens),
            "--speculative-num-draft-tokens",
            str(pool.mtp_draft_tokens + 1),
            "--speculative-eagle-topk",
            "1",
        ]
    if plan.precision.kv == "fp8":
        args += ["--kv-cache-dtype", "fp8_e4m3"]
    if not pool.prefix_cache:
        args.append("--disable-radix-cache")
    if plan.separated:
        args += ["--disaggregation-mode", pool.role]
    return args


def notes(plan: Plan, engine: str) -> list[str]:
    """What the target engine cannot express."""
    lost = []
    for pool in plan.pools:
        if pool.ep not in (1, pool.world) and engine in ("vllm", "pai"):
            lost.append(f"{pool.role}: ep {pool.ep} of a world of {pool.world} has no vLLM flag; vLLM will use {pool.world}")
        if pool.comm in ("symm", "nccl", "gloo"):
            lost.append(f"{pool.role}: all-to-all backend {pool.comm!r} is eptwin's own; the engine's default is used")
    if plan.router not in ("round_robin", "least_loaded"):
        lost.append(f"router {plan.router!r} must be set up in front of the engines")
    return lost


def _commands(program: Callable[[str], str], arguments: Callable[[Plan, PoolPlan], list[str]], engine: str) -> Callable[..., str]:
    def write(plan: Plan, model: ModelSpec, cluster: ClusterSpec, image: str, instance_type: str) -> str:
        lines = ["#!/bin/sh", f"# {plan.name}: {model.name} on {cluster.name}"]
        lines += [f"# not carried over: {note}" for note in notes(plan, engine)]
        for pool in plan.pools:
            nodes = -(-pool.world // cluster.group(pool.node_group).gpus_per_node)
            lines.append(
                f"# {pool.role}: start {pool.instances} of these, each on {pool.world} GPUs "
                f"({nodes} node{'s' if nodes > 1 else ''})"
            )
            lines.append(f"{program(model.name)} {shlex.join(arguments(plan, pool))}")
        return "\n".join(lines) + "\n"

    return write


def _leader_worker_sets(plan: Plan, model: ModelSpec, cluster: ClusterSpec, image: str, instance_type: str) -> str:
    """One LeaderWorkerSet (leaderworkerset.x-k8s.io/v1) a pool: `size` pods an instance, one a node."""
    documents = []
    for pool in plan.pools:
        per_node = min(pool.world, cluster.group(pool.node_group).gpus_per_node)
        size = -(-pool.world // per_node)
        command = ["vllm", "serve", model.name, *vllm_arguments(plan, pool)]
        if size > 1:
            command += [
                "--data-parallel-address",
                "$(LWS_LEADER_ADDRESS)",
                "--data-parallel-size-local",
                str(max(1, per_node // pool.tp)),
            ]
        container = {
            "name": pool.role,
            "image": image,
            "command": command,
            "resources": {"limits": {"nvidia.com/gpu": str(per_node)}},
            "ports": [{"containerPort": 8000}],
        }
        template = {"spec": {"containers": [container]}}
        documents.append(
            {
                "apiVersion": "leaderworkerset.x-k8s.io/v1",
                "kind": "LeaderWorkerSet",
                "metadata": {"name": f"eptwin-{pool.role}", "annotations": _annotations(plan)},
                "spec": {"replicas": pool.instances, "leaderWorkerTemplate": {"size": size, "workerTemplate": template}},
            }
        )
    return "".join(f"---\n{json.dumps(d, indent=2)}\n" for d in documents)


def _dynamo(plan: Plan, model: ModelSpec, cluster: ClusterSpec, image: str, instance_type: str) -> str:
    """A DynamoGraphDeployment, nvidia.com/v1beta1: components with pod templates."""
    components = []
    for pool in plan.pools:
        per_node = min(pool.world, cluster.group(pool.node_group).gpus_per_node)
        container = {
            "name": "main",
            "image": image,
            "command": ["python3", "-m", "dynamo.vllm"],
            "args": ["--model", model.name, *vllm_arguments(plan, pool)],
            "resources": {"limits": {"nvidia.com/gpu": str(per_node)}},
        }
        component: dict[str, Any] = {
            "name": pool.role,
            "replicas": pool.instances,
            "podTemplate": {"spec": {"containers": [container]}},
        }
        if pool.world > per_node:
            component["multinode"] = {"nodeCount": -(-pool.world // per_node)}
        components.append(component)
    frontend = {"name": "main", "image": image, "command": ["python3", "-m", "dynamo.frontend"], "args": ["--router-mode", "kv"]}
    components.insert(0, {"name": "frontend", "replicas": 1, "podTemplate": {"spec": {"containers": [frontend]}}})
    document = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "eptwin-plan", "annotations": _annotations(plan)},
        "spec": {"components": components},
    }
    return json.dumps(document, indent=2) + "\n"


def _pai(plan: Plan, model: ModelSpec, cluster: ClusterSpec, image: str, instance_type: str) -> str:
    """A PAI-EAS service a pool: EP_SIZE, DP_SIZE and TP_SIZE as environment variables, one JSON list."""
    services = []
    for pool in plan.pools:
        per_node = cluster.group(pool.node_group).gpus_per_node
        environment = [
            {"name": name, "value": str(value)}
            for name, value in (("EP_SIZE", pool.ep), ("DP_SIZE", pool.dp), ("TP_SIZE", pool.tp))
        ]
        script = shlex.join(["vllm", "serve", model.name, "--port", "8000", *vllm_arguments(plan, pool)])
        services.append({
            "metadata": {"name": f"eptwin_{pool.role}", "instance": pool.instances, "gpu": min(pool.world, per_node)},
            "cloud": {"computing": {"instances": [{"type": instance_type or "INSTANCE_TYPE"}]}},
            "containers": [{"image": image, "script": script, "port": 8000, "env": environment}],
            "labels": _annotations(plan),
        })  # fmt: skip
    return json.dumps(services, indent=2) + "\n"


def _annotations(plan: Plan) -> dict[str, str]:
    lost = notes(plan, "pai")
    return {"eptwin/plan": plan.name} | ({"eptwin/not-carried-over": "; ".join(lost)} if lost else {})


FORMATS: dict[str, Callable[..., str]] = {
    "vllm": _commands(lambda name: f"vllm serve {shlex.quote(name)}", vllm_arguments, "vllm"),
    "sglang": _commands(
        lambda name: f"python3 -m sglang.launch_server --model-path {shlex.quote(name)}", sglang_arguments, "sglang"
    ),
    "lws": _leader_worker_sets,
    "dynamo": _dynamo,
    "pai": _pai,
}
