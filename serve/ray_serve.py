"""Replicas on many machines with Ray Serve LLM, scaled by the number of current requests.

serve run serve.ray_serve:app        (qkit's tests do not run it)

Run `pip install 'ray[serve,llm]'` in a separate environment: Ray 2.60 pins vLLM 0.29, and qkit's is newer. Both read the same exports.

The engine has the options that `qkit serve` gives vLLM. Ray has its own routing, scaling, health checks and draining, so `qkit.admission` is
not used. Ray's proxy does not check a key: put nginx.conf, envoy.yaml, or a gateway that checks one in front of it.
"""

from __future__ import annotations

from ray.serve.llm import LLMConfig, build_openai_app

MODEL = "/srv/model"  # an export of a run, with the same path on every machine
ENGINE = {"max_model_len": 2048, "gpu_memory_utilization": 0.9}

config = LLMConfig(
    model_loading_config={"model_id": "model", "model_source": MODEL},
    engine_kwargs=ENGINE,
    deployment_config={
        "max_ongoing_requests": 256,
        "graceful_shutdown_wait_loop_s": 2,
        "graceful_shutdown_timeout_s": 60,
        "autoscaling_config": {"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 32},
    },
)
app = build_openai_app({"llm_configs": [config]})
