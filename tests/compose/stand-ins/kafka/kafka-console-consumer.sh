#!/usr/bin/env python3
"""Kafka's console consumer, as far as the test uses it: every record of a topic, key and value with a tab between."""

import argparse
import sys

sys.path.insert(0, "/opt/packages")
from confluent_kafka import Consumer, OFFSET_BEGINNING, TopicPartition  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--bootstrap-server", required=True)
parser.add_argument("--topic", required=True)
parser.add_argument("--from-beginning", action="store_true", required=True)
parser.add_argument("--timeout-ms", type=int, default=None)
parser.add_argument("--property", action="append", default=[])
options = parser.parse_args()

consumer = Consumer({"bootstrap.servers": options.bootstrap_server, "group.id": "console", "enable.auto.commit": False})
partitions = consumer.list_topics(options.topic, timeout=10).topics[options.topic].partitions
consumer.assign([TopicPartition(options.topic, partition, OFFSET_BEGINNING) for partition in partitions])
wait = -1 if options.timeout_ms is None else options.timeout_ms / 1000
read = 0
while (record := consumer.poll(wait)) is not None:
    if record.error():
        sys.exit(str(record.error()))
    key = [record.key().decode()] if "print.key=true" in options.property else []
    print("\t".join([*key, record.value().decode()]))
    read += 1
print(f"Processed a total of {read} messages", file=sys.stderr)
