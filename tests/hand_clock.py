"""A clock that stands still until the test moves it on."""


class HandClock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def run(self, seconds: float) -> None:
        self.now += seconds
