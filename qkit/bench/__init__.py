"""The bench stage and `qkit bench`: latency, throughput and memory of each artifact on the same prompts.

In: artifacts, or the URL of any server. Out: RUN/bench/ with one JSON record per load. Start with stage.py; record.py defines the figures,
load.py and tool.py send the requests. Imported by qkit.commands, qkit.cli and the pipeline.
"""
