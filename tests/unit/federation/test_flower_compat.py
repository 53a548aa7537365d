"""The private names of Flower that fedlp touches are where it expects them."""

from __future__ import annotations

from flwr.app import Message, RecordDict

from fedlp.federation import flower_compat


def test_a_process_outside_of_any_superlink_can_make_messages() -> None:
    flower_compat.become_server()
    message = Message(RecordDict(), 7, "train")
    flower_compat.set_message_id(message, "m-1")
    reply = Message(RecordDict(), reply_to=message)
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == ("m-1", 7)


def test_an_instruction_looks_as_if_it_came_from_the_server() -> None:
    message = flower_compat.make_instruction(RecordDict(), "m-2", 3, "train", "5")
    assert message.metadata.dst_node_id == 3
    assert message.metadata.group_id == "5"
    assert Message(RecordDict(), reply_to=message).metadata.dst_node_id == flower_compat.SERVER_NODE


def test_an_array_takes_a_view_without_a_copy() -> None:
    data = memoryview(bytearray(8))
    assert flower_compat.make_array("uint8", (8,), "raw", data).data is data


def test_a_run_can_be_described() -> None:
    assert flower_compat.make_run().run_id == flower_compat.RUN_ID
