from my_connector import FileConnector

from kvsdk.testing import Capabilities, Prompt, Subject, World


def test_a_damaged_file_costs_time_not_answers(tmp_path):
    subject = Subject(FileConnector, Capabilities(saves=True), options={"folder": str(tmp_path)})
    prompt = Prompt(30)
    with World(subject) as world:
        world.run(world.add(0, prompt))
        world.settle()
        files = sorted(tmp_path.glob("*/*"))
        assert len(files) == 8  # seven blocks of four tokens, and a tail of two
        for file in files[:2]:
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

        world.run(world.add(1, prompt))
        assert world.stats("loads_failed") == 1

        world.settle()
        world.restart(1)
        number = world.add(1, prompt)
        world.run(number)
        assert world.cached(number) == 29  # of the last token vLLM computes the answer
        assert world.stats("loads_failed", 1) == 0
