"""The campaign of ImageNet's size with one image for each class."""

import campaign_imagenet
import pytest


@pytest.mark.long
def test_commands_and_a_killed_conversion_of_a_small_data_set() -> None:
    outcome = campaign_imagenet.run(images=3000, command_images=2000, kills=1)
    # How long it takes is for the campaign at its size, not for a busy machine.
    complaints = [line for line in outcome.complaints if "s of CPU" not in line]
    assert not complaints, outcome.note
    assert outcome.trials == 5
