"""The stems of a client: what was asked for against what the cluster offers, each fetched and made once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trunkline_wire.specs import FLOAT32, INPUT_CUT, BackboneSpec, CutSpec

from trunkline._codecs import (
    AUTO,
    DEFAULT_CODEC,
    check_codec,
    check_error,
    check_max_error,
    check_offered,
    check_precision,
    choose_codec,
    offered_codecs,
)
from trunkline._onnx import check_threads, require_onnxruntime
from trunkline._stem_files import StemCache, StemFile, checked_file
from trunkline.bottlenecks import Bottlenecks, BottleneckStem
from trunkline.errors import (
    CorruptDataError,
    IncompatibleModelError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from trunkline.own_stems import OwnStem
from trunkline.progress import show_progress
from trunkline.stems import Stem

if TYPE_CHECKING:
    from pathlib import Path

    from trunkline._backbones import Backbones
    from trunkline._calls import FetchedStem
    from trunkline._calls.catalog import CatalogCalls
    from trunkline._deadline import Deadline
    from trunkline.local_models import LocalModel
    from trunkline.records import ServerInfo


class StemShelf:
    """Makes stems and keeps them."""

    def __init__(
        self,
        calls: CatalogCalls,
        info: ServerInfo,
        cache_dir: Path,
        backbones: Backbones,
        bottlenecks: Bottlenecks,
    ) -> None:
        """Keep who is asked.

        Args:
            calls: To the cluster.
            info: What the cluster said about itself.
            cache_dir: Where files are kept.
            backbones: Describes backbones and cuts.
            bottlenecks: Finds bottlenecks.
        """
        self._calls = calls
        self._info = info
        self._cache = StemCache(cache_dir)
        self._backbones = backbones
        self._bottlenecks = bottlenecks
        self._stems: dict[tuple[object, ...], Stem] = {}

    def get(
        self,
        name: str,
        cut_name: str,
        input_size: int,
        *,
        precision: str,
        codec: str | None,
        max_error: float | None,
        bottleneck: str | None,
        threads: int | None,
        deadline: Deadline,
        progress: bool | None,
    ) -> Stem:
        """Return a stem. See ``Client.stem``."""
        check_precision(precision)
        check_threads(threads)
        bound = check_max_error(max_error)
        if bottleneck is not None:
            if precision != FLOAT32:
                raise InvalidArgumentError(
                    "a bottleneck is for features of the exact stem", hint="Leave precision= out"
                )
            most = math.inf if max_error is None else bound
            return self._narrow(name, cut_name, input_size, bottleneck, codec, most, threads, deadline, progress)
        choice = None if codec == AUTO else check_offered(check_codec(codec or DEFAULT_CODEC), self._info)
        require_onnxruntime()
        spec, cut = self._find(name, cut_name, input_size, deadline)
        codec_error = None
        if choice is None:
            cost = self._backbones.cost(name, cut_name, input_size, deadline)
            chosen = choose_codec(cost, precision, offered_codecs(self._info), bound)
            choice, codec_error = check_codec(chosen.codec), chosen.embedding_error
        elif max_error is not None:
            codec_error = check_error(
                self._backbones.cost(name, cut_name, input_size, deadline), precision, choice, bound
            )
        space = spec.space(cut, precision)
        key = (space, str(choice), codec_error, threads)
        if key not in self._stems:
            file = self._file(spec, cut, precision, input_size, deadline, progress)
            self._stems[key] = Stem(
                file.data,
                space,
                spec.preprocessing,
                cut.feature_shape,
                channel_axis=cut.channel_axis,
                precision=precision,
                stem_error=file.embedding_error,
                codec=str(choice),
                codec_error=codec_error,
                threads=threads,
            )
        return self._stems[key]

    def own(
        self, local: LocalModel, name: str, cut_name: str, input_size: int, codec: str, deadline: Deadline
    ) -> OwnStem:
        """Return a local model in the place of a stem. See ``Client.own_stem``."""
        choice = check_offered(check_codec(codec), self._info)
        spec, cut = self._find(name, cut_name, input_size, deadline)
        return OwnStem(local, spec, cut, str(choice))

    def _narrow(
        self,
        name: str,
        cut_name: str,
        input_size: int,
        sha256: str,
        codec: str | None,
        max_error: float,
        threads: int | None,
        deadline: Deadline,
        progress: bool | None,
    ) -> Stem:
        """Return a stem with a bottleneck."""
        choice = None if codec is None else check_codec(codec)
        require_onnxruntime()
        spec, cut = self._find(name, cut_name, input_size, deadline)
        found = self._bottlenecks.get(sha256, deadline)
        if found.space != spec.space(cut) or found.feature_shape != cut.feature_shape:
            where = found.space
            raise IncompatibleModelError(
                f"the bottleneck {sha256[:12]} is for {where.backbone} at {where.cut}, input size {where.input_size}; "
                f"asked for is {spec.name} at {cut.name}, input size {spec.preprocessing.input_size}",
                hint="Ask for what it is for; if that is the same, the weights are others now: fit a new one",
            )
        if choice is not None and choice.codec != found.codec:
            raise InvalidArgumentError(
                f"codes of the bottleneck {sha256[:12]} travel as {found.codec}; codec is {codec}",
                hint="Leave codec= out",
            )
        if found.embedding_error > max_error:
            raise UnsupportedError(
                f"the embedding error of the bottleneck {sha256[:12]} is {found.embedding_error:.3g}; at most "
                f"{max_error:g} is allowed",
                hint="Allow more with max_error=, or fit one with more code_channels",
            )
        zstd = choice is not None and choice.zstd
        key = (sha256, zstd, threads)
        if key not in self._stems:
            data = self._file(spec, cut, FLOAT32, input_size, deadline, progress).data
            self._stems[key] = BottleneckStem(data, spec.preprocessing, found, sha256, zstd=zstd, threads=threads)
        return self._stems[key]

    def _find(self, name: str, cut_name: str, input_size: int, deadline: Deadline) -> tuple[BackboneSpec, CutSpec]:
        """Return a backbone and one of its cuts at which a stem can end."""
        spec = self._backbones.describe(name, input_size, deadline)
        cut = spec.cut(cut_name)
        if cut is None:
            # The backbone may have been replaced since. If not, the cluster knows best what is near that name.
            spec = self._backbones.describe(name, input_size, deadline, again=True)
            cut = spec.cut(cut_name)
        if cut is None:
            self._fetch(name, cut_name, input_size, FLOAT32, deadline, False)
            raise NotFoundError(f"{spec.name} has no cut {cut_name!r}", hint="client.describe(name).cuts has them all")
        if cut_name == INPUT_CUT:
            stages = [one.name for one in spec.cuts if one.is_stage] or [one.name for one in spec.cuts[1:6]]
            raise InvalidArgumentError(
                "there is no stem before the input: images go there as they are",
                hint=f"Leave stem= out, or choose another cut, for example {', '.join(stages)}",
            )
        return spec, cut

    def _file(
        self,
        spec: BackboneSpec,
        cut: CutSpec,
        precision: str,
        input_size: int,
        deadline: Deadline,
        progress: bool | None,
    ) -> StemFile:
        """Return a stem's file, from the cache or fetched and then kept."""
        space = spec.space(cut, precision)
        # Without a fingerprint the cluster offers no such stem here: let it say why.
        cached = self._cache.load(space.fingerprint) if space.fingerprint else None
        if cached is not None:
            return cached
        fetched = self._fetch(spec.name, cut.name, input_size, precision, deadline, progress)
        if (fetched.precision or FLOAT32) != precision:
            raise UnsupportedError(
                f"the cluster (version {self._info.version}) has no stems of precision {precision}",
                hint=f"Use precision={FLOAT32!r}, or update the cluster",
            )
        if fetched.space != space or fetched.feature_shape != cut.feature_shape:
            raise CorruptDataError(
                f"the cluster sent another stem than the one it described for {spec.name} at {cut.name}",
                hint="Try again: its backbone may just have been replaced",
            )
        file = checked_file(fetched)
        self._cache.store(fetched)
        return file

    def _fetch(
        self, name: str, cut: str, input_size: int, precision: str, deadline: Deadline, progress: bool | None
    ) -> FetchedStem:
        what = "stem" if precision == FLOAT32 else f"{precision} stem"
        with show_progress(f"Fetching the {what} of {name} at {cut}", 0.0, progress) as bar:
            return self._calls.fetch_stem(
                name,
                cut,
                input_size,
                deadline,
                precision=precision,
                on_bytes=lambda done, total: bar.update(done, total=total),
            )
