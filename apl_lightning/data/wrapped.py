"""The data module of an existing project as target images."""

from typing import Any

from apl_lightning._support.lightning import LightningDataModule, as_validation, loader_in_use
from apl_lightning._support.lightning_package import overrides
from apl_lightning.data.datamodule import TargetDataModule
from apl_lightning.data.project import TransferHooks, read_loader

_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")


class WrappedDataModule(TargetDataModule):
    """The data sets of another data module, which exist only after its own setup."""

    def __init__(self, existing: LightningDataModule, options: dict[str, Any]) -> None:
        self._existing = existing
        self._fixed = set(options)
        self._hooks: dict[str, TransferHooks] = {}  # of each loader
        super().__init__(**options)
        self.prepare_data_per_node = getattr(existing, "prepare_data_per_node", True)

    def prepare_data(self) -> None:
        self._existing.prepare_data()

    def setup(self, stage: str) -> None:
        if overrides(self._existing, "transfer_batch_to_device"):
            raise ValueError(
                f"Expected {type(self._existing).__name__} to leave `transfer_batch_to_device` to Lightning, but got "
                "its own: change images in `on_after_batch_transfer`."
            )
        self._existing.trainer = self.trainer
        self._existing.setup(stage)
        for name in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]:
            if self._is_theirs(name):
                self._take(name)
        super().setup(stage)

    def teardown(self, stage: str) -> None:
        self._existing.teardown(stage)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._through_hook("on_before_batch_transfer", batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._through_hook("on_after_batch_transfer", batch, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "existing": self._existing.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._existing.load_state_dict(state_dict.get("existing", {}))
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "existing"})

    def _through_hook(self, name: str, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer is None or (hooks := self._hooks.get(loader_in_use(self.trainer))) is None:
            return batch
        with as_validation(self.trainer):
            return hooks(name, batch, dataloader_idx)

    def _has(self, name: str) -> bool:
        return self._is_theirs(name) or super()._has(name)

    def _is_theirs(self, name: str) -> bool:
        """Whether a data set is that of the existing data module."""
        return name not in self._fixed and overrides(self._existing, f"{name}_dataloader")

    def _take(self, name: str) -> None:
        method = f"{name}_dataloader"
        loader = getattr(self._existing, method)()
        if isinstance(loader, list | tuple) and len(loader) == 1:
            (loader,) = loader
        if isinstance(loader, list | tuple) and not loader and name != "train":  # as good as no such method
            self._fixed.add(name)
            return
        owner = f"`{method}` of {type(self._existing).__name__}"
        dataset, options = read_loader(loader, owner, self.keys, trains=name == "train")
        size, attribute = options.pop("batch_size"), "batch_size" if name == "train" else "val_batch_size"
        if attribute not in self._fixed:
            setattr(self, attribute, size)
        setattr(self, name, dataset)
        self._loader_options[name] = {option: options[option] for option in options if option not in self._fixed}
        hooks = {hook: getattr(self._existing, hook) for hook in _HOOKS if overrides(self._existing, hook)}
        if hooks:
            self._hooks[name] = TransferHooks(hooks, loader.collate_fn([loader.dataset[0]]), self.keys)
