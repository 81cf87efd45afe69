import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from ti_jax.training.tensorboard import Board


def test_records_are_those_of_tensorboards_own_format(tmp_path):
    """Byte for byte what the reference writer makes of the same events."""
    board = Board(tmp_path / "logs", first_step=5)
    board.scalar("loss", 0.25, 7)
    board.image("validation", Image.fromarray(np.zeros((4, 4, 3), np.uint8)), 8)
    (path,) = (tmp_path / "logs").iterdir()
    assert path.name.startswith("events.out.tfevents.")

    content, events = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert [event.step for event in events] == [0, 6, 7, 8]
    assert events[0].file_version == "brain.Event:2" and events[1].session_log.status == SessionLog.START
    assert events[2].summary.value[0].tag == "loss" and events[2].summary.value[0].simple_value == 0.25
    assert events[3].summary.value[0].image.width == 4

    reference = RecordWriter(str(tmp_path / "reference"))
    for event in events:
        reference.write(event.SerializeToString())
    reference.close()
    assert (tmp_path / "reference").read_bytes() == path.read_bytes()
