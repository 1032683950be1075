"""Many replicas over many machines with Ray Serve LLM, scaled by requests in work.

serve run serve.ray_serve:app        (not started in qkit's tests)

`pip install 'ray[serve,llm]'` in an environment of its own: Ray 2.60 pins vLLM 0.29, qkit's is a newer one. Both read the same exports.

The engine's options are those that `qkit serve` gives vLLM; Ray has routing, scaling, health and draining of its own, so `qkit.admission`
is left out. Ray's proxy asks for no key: put nginx.conf or envoy.yaml, or a gateway that does, in front of it.
"""

from __future__ import annotations

from ray.serve.llm import LLMConfig, build_openai_app

MODEL = "/srv/model"  # an export of a run, at the same place on every machine
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
