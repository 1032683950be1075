"""The bench stage and `qkit bench`: latency, throughput and memory of each artifact on the same prompts.

In: artifacts, or the URL of any server. Out: RUN/bench/ with one JSON record for each load. Start with stage.py; record.py says what
each figure means, load.py and tool.py send the requests.
"""
