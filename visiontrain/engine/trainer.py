"""The run: steps, epochs, evaluation, checkpoints, and how it may end."""

from __future__ import annotations

import logging
import shlex
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from visiontrain.core.errors import DivergedError, Stopped, StorageError
from visiontrain.core.types import Outcome
from visiontrain.data.loader import Step
from visiontrain.engine.checkpoint import Found
from visiontrain.engine.evaluate import Evaluation
from visiontrain.engine.journal import Journal, Meter, Pace
from visiontrain.engine.parts import Ending, FitSettings, Parts
from visiontrain.engine.signals import Signals, unsaved
from visiontrain.engine.step import train_step
from visiontrain.engine.weights import digest

MAX_STREAK = 10  # non-finite steps in a row before the run is rolled back
MAX_ROLL_BACKS = 3
LOWER = "try a lower optim.lr, a longer optim.warmup or precision=fp32"

_error = logging.getLogger(__name__).error


class Trainer:
    """Trains a learner from wherever its folder says it stands."""

    def __init__(self, parts: Parts, settings: FitSettings) -> None:
        self.parts, self.settings = parts, settings
        self.learner, self.strategy = parts.learner, parts.learner.strategy
        self.journal, self.signals = Journal(), Signals()
        self.strategy.stopping = lambda: bool(self.signals.received)
        self.meter, self.pace = Meter(self.strategy.place.device), Pace()
        self._began = time.monotonic()
        self._ran: deque[int] = deque(maxlen=1000)  # the newest steps, to name the bad ones
        self._shown_epoch = -1

    def fit(self) -> Outcome:
        """Train to the end, or until a signal; leave weights, checkpoints and results.

        Raises:
            DivergedError: when steps stay non-finite after roll-backs.
            StorageError: when the folder cannot be written.
            CheckpointError: when the folder's checkpoints cannot be used.
        """
        exit_code, wait = 1, True
        with self.signals:
            try:
                self._open()
                outcome = Outcome({}, stopped) if (stopped := self._train()) else self._finish()
                exit_code = outcome.exit_code
            except KeyboardInterrupt:  # a second Ctrl-C must not wait for a disk
                wait = False
                raise
            else:
                return outcome
            finally:
                self.parts.saver.close(wait=wait)
                self.parts.progress.close()
                for logger in self.parts.loggers:
                    logger.close(exit_code=exit_code)

    # -- the loop -----------------------------------------------------------------

    def _train(self) -> int:
        while True:
            try:
                ending = self._pass()
            except Stopped:  # the epoch is not over yet: whoever goes on scores it
                ending = Ending.STOPPED
            if ending is Ending.COMPLETE:
                self._say_why()
                return 0
            if ending is Ending.STOPPED:
                return self._save_and_stop()
            self._roll_back()

    def _pass(self) -> Ending:
        """Run steps from where the learner stands until something ends them."""
        self._jump()
        if self._epoch_is_over():
            self._end_epoch()
        if self._finished() or (self.learner.step and self._late()):
            if self.journal.best is None or self.learner.step > self.journal.ended:
                self._end_epoch(late=True)  # a signal came first, or fewer epochs are asked for
            return Ending.COMPLETE
        self.parts.saver.rest()  # loaders are forks, which must not be made beside a thread
        steps = self.parts.steps(self.learner.step, frozenset(self.journal.skipped))
        ending = None
        while ending is None:
            step = self._next(steps)
            ending = Ending.STOPPED if step is None else self._step(step)
        return ending

    def _next(self, steps: Iterator[Step]) -> Step | None:
        """Wait for data, and meet before any waits for others on a GPU; None after a signal."""
        self.pace.begin()
        try:
            step = next(steps)
        except RuntimeError:
            if self.signals.received and self.strategy.place.world == 1:
                return None
            raise
        self.pace.fetched()
        return None if self._asked_to_stop() else step

    def _step(self, step: Step) -> Ending | None:
        """Train one step; then log, score and save what is due. None goes on."""
        self._show_epoch(step.epoch)
        first, before = self.learner.step, self.learner.samples
        result = train_step(self.learner, step.micro_batches, step.images)
        idle, self.strategy.starting = self.strategy.starting, 0.0
        self.pace.leave_out(idle)
        self._began += idle
        self.journal.lr = self.learner.lr
        self.meter.add(result.terms)
        self._ran.append(step.step)
        self._jump()
        over = self._epoch_is_over()
        every = self.settings.save.every_steps
        save = every is not None and self.learner.step // every > first // every
        look = over or save or self.learner.step % self.settings.log_every == 0
        if look and self._streak() >= MAX_STREAK:
            return Ending.UNSTABLE
        self.journal.train_seconds += self.pace.done(self.learner.samples - before)
        if look:
            self._report()
        return self._due(over=over, save=save)

    def _due(self, *, over: bool, save: bool) -> Ending | None:
        """Score and save after an epoch, or save inside one."""
        late = self._late()
        if over or late:
            return Ending.COMPLETE if self._end_epoch(late=late, save=save) else None
        if save:
            self._save()
        return None

    def _jump(self) -> None:
        """Move over steps that are left out, so that `learner.step` is the next to run."""
        while self.learner.step in self.journal.skipped:
            self.learner.step += 1

    def _epoch_is_over(self) -> bool:
        return self.learner.step // self.settings.steps_per_epoch > self.journal.epochs

    def _finished(self) -> bool:
        patience = self.settings.patience if self.settings.evaluate else 0
        tired = bool(patience) and self.journal.stale >= patience
        return self.journal.epochs >= self.settings.epochs or tired

    def _say_why(self) -> None:
        """Say what ended a training before its last epoch."""
        late = self._late()
        if self.journal.epochs >= self.settings.epochs:
            return
        if self._finished():
            why = f"no better score for {self.settings.patience} epochs; patience=0 goes on"
        elif late:
            why = f"time={self.settings.hours:g} hours are over; a longer time goes on"
        else:
            return
        self.parts.progress.message(f"complete after epoch {self.journal.epochs}: {why}")

    def _late(self) -> bool:
        """Tell whether the time is up by any process's clock."""
        hours = self.settings.hours
        return hours is not None and self.strategy.any(flag=self._seconds() > hours * 3600)

    def _seconds(self) -> float:
        return self.journal.seconds + time.monotonic() - self._began

    def _streak(self) -> int:
        """Count the failed steps up to now, on the rank with the most. Collective."""
        self.strategy.any(flag=False)  # a rank that hangs is told from a GPU that waits for it
        streak = self.learner.nonfinite.item()
        if self.strategy.apart:
            rows = self.strategy.gather(torch.tensor([[streak]], dtype=torch.float64))
            streak = rows.max().item()
        return int(streak)

    # -- epochs -------------------------------------------------------------------

    def _show_epoch(self, epoch: int) -> None:
        if epoch != self._shown_epoch:
            self._shown_epoch, settings = epoch, self.settings
            self.parts.progress.start_epoch(epoch + 1, settings.epochs, settings.steps_per_epoch)

    def _report(self) -> None:
        """Show where the run stands."""
        done = (self.learner.step - 1) % self.settings.steps_per_epoch + 1
        numbers = {"lr": self.journal.lr, **self.pace.recent()}
        self.parts.progress.step(done, self.meter.recent(), numbers)

    def _end_epoch(self, *, late: bool = False, save: bool = False) -> bool:
        """Score, log and save an epoch, always where `save`; return whether it was the last."""
        journal, steps, step = self.journal, self.settings.steps_per_epoch, self.learner.step
        done, bad = step // steps, self._streak()
        epoch = -(-step // steps) if late else done  # then a part of one counts
        if epoch - 1 > max(journal.skipped, default=-1) // steps and not bad:
            journal.roll_backs = 0  # over a whole good epoch, and not one that came again
        last = late or done >= self.settings.epochs
        metrics = self._scores(epoch, last=last) if self.settings.evaluate or last else {}
        score = metrics.get(self.learner.task.best)
        improved = score is not None and journal.judge(float(score), epoch)
        journal.epochs, journal.ended = done, step  # now: one that is stopped comes again
        last = last or self._finished()
        self._log(epoch, metrics, over=not late or step % steps == 0)
        self.parts.saver.weights(metrics, epoch, improved=improved)
        bad += len(journal.skipped)
        if last and 2 * bad > step:
            raise DivergedError(f"training: {bad} of {step} steps were not finite; {LOWER}")
        if last or save or journal.epochs % self.settings.save.every_epochs == 0:
            self._save(last=last)
        return last

    def _scores(self, epoch: int, *, last: bool) -> Mapping[str, Any]:
        """Score an epoch; none where they are not finite, which steps that follow may mend."""
        self.parts.saver.rest()  # as before the loaders of training
        try:
            return self.parts.evaluate(self._asked_to_stop).metrics
        except DivergedError as error:
            if last and self.journal.best is None:
                raise
            self.parts.progress.message(f"epoch {epoch} is not scored: {error}")
            return {}

    def _log(self, epoch: int, metrics: Mapping[str, Any], *, over: bool) -> None:
        """Write the epoch's row, with the columns of results.csv; of a part unless it is `over`."""
        train, pace = self.meter.epoch(over=over), self.pace.epoch()
        row: dict[str, float] = {
            "epoch": epoch,
            "step": self.learner.step,
            "samples": self.learner.samples,
            "seconds": self._seconds(),
            **pace,
            "lr": self.journal.lr,
            **{f"train/{name}": value for name, value in train.items()},
            **{f"val/{name}": v for name, v in metrics.items() if isinstance(v, int | float)},
            **self.strategy.numbers(),
            "bytes_sent": self.strategy.bytes_sent,
        }
        for logger in self.parts.loggers:
            logger.log(row, self.learner.step)
        self.parts.progress.end_epoch(row)

    # -- the end ------------------------------------------------------------------

    def _asked_to_stop(self) -> bool:
        return self.strategy.any(flag=bool(self.signals.received))

    def _agree(self) -> int:
        """Let every rank know the signal that any of them got."""
        mine = torch.tensor([[float(self.signals.received)]], dtype=torch.float64)
        self.signals.received = int(self.strategy.gather(mine).max())
        return self.signals.received

    def _save_and_stop(self) -> int:
        """Save after a signal to any rank; return the exit code that tells how it went."""
        received = self._agree()
        try:
            # Also amid non-finite steps: they changed nothing, and this is the last chance.
            self.parts.saver.forget()
            self.parts.saver.checkpoint(self._state())
            self.parts.saver.settle()
        except StorageError as error:
            if self.strategy.place.is_main:
                _error("%s", error)
            return unsaved(received)
        self.parts.progress.message(
            f"saved at step {self.learner.step}; go on with: {self._again()}"
        )
        return self.signals.exit_code

    def _finish(self) -> Outcome:
        """Leave the final scores and pictures."""
        self.parts.saver.settle()
        try:
            final = self._score_best()
        except Stopped:
            self._agree()
            self.parts.progress.message(
                f"trained and saved, not scored; its results come with: {self._again()}"
            )
            return Outcome({}, self.signals.exit_code)
        self.strategy.conclude(self.learner)
        outcome = Outcome(self._summary(final), 0, final.rows)
        for name, path in self.parts.finish(outcome).items():
            for logger in self.parts.loggers:
                logger.image(name, path, self.learner.step)
        return outcome

    def _score_best(self) -> Evaluation:
        """Score the weights in best.safetensors: what metrics.json reports."""
        named = self.learner.tensors()
        self.strategy.scatter(self.parts.saver.best(), named["ema"] or named["model"])
        return self.parts.evaluate(self._asked_to_stop)

    def _summary(self, final: Evaluation) -> dict[str, Any]:
        """Add to the scores how they were come by."""
        journal, seconds = self.journal, self.journal.train_seconds
        return final.metrics | {
            "epochs": journal.epochs,
            "best_epoch": journal.best_epoch,
            "steps": self.learner.step,
            "samples": self.learner.samples,
            "seconds": self._seconds(),
            "train_images_per_s": self.learner.samples / seconds if seconds else 0.0,
            "skipped_steps": len(journal.skipped),
            "bytes_sent": self.strategy.bytes_sent,
            **self.strategy.summary(),
            "initial_sha256": journal.initial_sha256,
        }

    def _again(self) -> str:
        place = shlex.quote(str(self.parts.saver.folder.path))
        return f"visiontrain {self.settings.verb} out={place} resume=true"

    # -- saving and going on ------------------------------------------------------

    def _save(self, *, last: bool = False) -> None:
        """Write a checkpoint, but not amid non-finite steps: a roll-back must not end there."""
        if last or not self._streak() or not self.parts.saver.exists():
            self.parts.saver.checkpoint(self._state())

    def _state(self) -> dict[str, Any]:
        return self.journal.state() | {
            "step": self.learner.step,
            "samples": self.learner.samples,
            "seconds": self._seconds(),
            "bytes_sent": self.strategy.bytes_sent,
            "mode": self.strategy.summary(),
            "meter": self.meter.state(),
            "loggers": {logger.name: logger.state() for logger in self.parts.loggers},
        }

    def _open(self) -> None:
        """Take up the folder's newest checkpoint, or leave a first one to roll back to."""
        found = self.parts.saver.newest()
        if found:
            self._restore(found)
        for logger in self.parts.loggers:
            logger.start(self.parts.config, self.parts.saver.folder.path)
        if found:
            scored = self.learner.step <= self.journal.ended
            over = scored and self._finished() and not self._epoch_is_over()
            does = "complete, only its results are written again" if over else "going on"
            self.parts.progress.message(f"{does}, from {found.path}")
        else:
            # Whole on the main process alone, which writes it.
            start = self.strategy.collect(self.learner.tensors()["model"], everywhere=False)
            self.journal.initial_sha256 = digest(start)
            self._save()
        self.parts.begin()
        self._began = time.monotonic()

    def _restore(self, found: Found) -> None:
        for line in found.rejected:
            self.parts.progress.message(line)
        dropped = self.parts.saver.restore(found)
        if dropped:
            self.parts.progress.message(dropped)
        progress = found.snapshot.progress
        self.learner.step, self.learner.samples = progress["step"], progress["samples"]
        self.learner.nonfinite.zero_()
        self.strategy.bytes_sent = progress["bytes_sent"]
        self.strategy.load_summary(progress.get("mode", {}))
        self.meter.load_state(progress["meter"])
        self.journal.load_state({"ended": progress["step"], **progress})  # older runs lack it
        for logger in self.parts.loggers:
            if logger.name in progress["loggers"]:
                logger.load_state(progress["loggers"][logger.name])

    def _roll_back(self) -> None:
        """Go back to the newest good checkpoint and leave out the steps that were not finite."""
        bad = set(list(self._ran)[-self._streak() :])
        skipped, times = self.journal.skipped | bad, self.journal.roll_backs + 1
        where = f"steps {min(bad)} to {max(bad)} were not finite"
        found = self.parts.saver.newest()
        if times > MAX_ROLL_BACKS or found is None:
            raise DivergedError(f"training: {where}, after {times - 1} roll-backs; {LOWER}")
        spent = self._seconds()
        journal = self.journal
        best = journal.best, journal.best_epoch, journal.stale
        self._restore(found)
        # What best.safetensors holds was earned, though what followed it was not.
        journal.best, journal.best_epoch, journal.stale = best
        journal.skipped, journal.roll_backs = skipped, times
        self.journal.seconds, self._began = spent, time.monotonic()
        self.parts.progress.message(
            f"{where}; back to step {self.learner.step}, leaving them out "
            f"({times} of {MAX_ROLL_BACKS} roll-backs)"
        )
