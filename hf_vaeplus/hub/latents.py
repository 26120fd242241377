"""Latents as a data set: the first VAE's posterior of every image, as parquet files and on the Hub."""

import json
import math
import os
import shutil
from collections.abc import Collection, Iterator
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from datasets import Features, List, Value
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCardData, HfApi
from pyarrow.parquet import ParquetWriter

from ..fields import utf8
from ..files import FULL
from ..progress import tqdm
from ..provenance import provenance
from .cards import code_text, plain_text, unicode_text

if TYPE_CHECKING:
    from ..data.cache import ImageDataset
    from ..data.stream import ImageStream
    from ..pipeline_vaeplus import VAEPlusPipeline

_ROWS_PER_GROUP = 8192  # rows that are held in memory and written together


def encode_to_parquet(
    pipe: "VAEPlusPipeline",
    images: "ImageDataset | ImageStream",
    output: str | Path,
    split: str = "train",
    batch_size: int = 64,
    rows_per_file: int = 1_000_000,
    label_column: str | None = None,
) -> list[Path]:
    """Write the first VAE's posterior of every image as a data set, in constant memory.

    `datasets.load_dataset` reads it back, with these columns: `index` (int64, the row of the image in its split),
    `file_name` where the images are files, `label` where the source has labels (numbers, lists or text), `mean` and
    `logvar` (float32 lists of length `latent_dim`). What is not complete has another name, and goes away when it is
    interrupted.

    Args:
        pipe ([`VAEPlusPipeline`]).
        images ([`~hf_vaeplus.data.cache.ImageDataset`] or [`~hf_vaeplus.data.stream.ImageStream`]): of the pipeline's
            size.
        output: `NAME.parquet` for one file; a name without a suffix for a folder, laid out like a data set on the Hub.
        split (`str`): what the files of a folder are named after.
        batch_size (`int`): images at a time.
        rows_per_file (`int`): when a file of a folder is full.
        label_column (`str`, *optional*): column of a table that holds the labels. Labels of pictures are the names of
            their folders, if there are several; those of MNIST's files lie beside them.

    Returns:
        The files.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: another suffix, images of another size or none at all, a number out of range, or no such column.
    """
    output = check_output(output)
    if batch_size < 1 or rows_per_file < 1:
        raise ValueError(f"batch_size and rows_per_file must be at least 1, got {batch_size} and {rows_per_file}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        if output.suffix:
            partial.mkdir()
            _write(partial, _posteriors(pipe, images, batch_size, _ROWS_PER_GROUP, label_column), math.inf)
            os.replace(partial / "0", output)
            return [output]
        (partial / "data").mkdir(parents=True)
        tables = _posteriors(pipe, images, batch_size, min(_ROWS_PER_GROUP, rows_per_file), label_column)
        count = _write(partial / "data", tables, rows_per_file)
        names = _hub_names(split, count)
        for number, name in enumerate(names):
            os.replace(partial / "data" / f"{number}", partial / name)
        os.replace(partial, output)
        return [output / name for name in names]
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"{output} cannot be written ({error.strerror}): free some space or name another.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: str | Path) -> Path:
    """A path that [`encode_to_parquet`] can write to; what it raises otherwise."""
    output = Path(output)
    if output.suffix not in ("", ".parquet"):
        raise ValueError(f"latents go to a file such as latents.parquet or to a folder such as latents, got {output}.")
    try:
        utf8(output)
    except ValueError as error:
        raise ValueError(f"output {error}") from None
    if output.exists():
        raise FileExistsError(f"{output} exists: name a new file or folder for the latents.")
    return output


def split_name(split: str) -> str:
    """Of `"train[20000:]"` the `"train"`."""
    return split.partition("[")[0]


def _hub_names(split: str, count: int) -> list[str]:
    """Where the Hub, and `datasets` in any folder, look for the files of a split."""
    return [f"data/{split_name(split)}-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


def _posteriors(pipe, images, batch_size: int, rows_per_table: int, label_column: str | None) -> Iterator[pa.Table]:
    """Tables of at least so many rows, but for the last."""
    dim = pipe.vae.config.latent_dim
    vector = List(Value("float32"), length=dim)
    facts = _facts(images, label_column)
    known = Features.from_arrow_schema(pa.schema([(name, column.type) for name, column in facts.items()]))
    schema = Features(index=Value("int64"), **known, mean=vector, logvar=vector).arrow_schema
    pending = []
    with tqdm(desc="encoding", unit="image", total=len(images) if hasattr(images, "__len__") else None) as bar:
        for batch in images.in_order(batch_size):
            posterior = pipe.encode(batch["pixel_values"], batch_size, preprocess=False)
            lists = [
                pa.FixedSizeListArray.from_arrays(pa.array(rows.flatten().numpy()), dim)
                for rows in (posterior.mean, posterior.logvar)
            ]
            index = pa.array(batch["index"].numpy())
            columns = [index, *(column.take(index) for column in facts.values()), *lists]
            pending.append(pa.table(columns, schema=schema))
            bar.update(len(batch["index"]))
            if sum(map(len, pending)) >= rows_per_table:
                yield pa.concat_tables(pending)
                pending = []
    if pending:
        yield pa.concat_tables(pending)


def _facts(images, label_column: str | None) -> dict[str, pa.Array]:
    """Names and labels of all rows of the source, where it has them.

    Labels are whole numbers (int64), other numbers (float64), lists of numbers (of float64) or text.
    """
    source, facts = getattr(images, "source", None), {}
    if source is None:
        return facts
    if (names := source.file_names()) is not None:
        facts["file_name"] = pa.array(names, pa.string())
    if (labels := source.labels(label_column)) is not None:
        if all(isinstance(label, int | None) for label in labels):
            facts["label"] = pa.array([None if label is None else int(label) for label in labels], pa.int64())
        elif all(isinstance(label, Real | None) for label in labels):
            facts["label"] = pa.array(labels, pa.float64(), from_pandas=True)
        elif all(label is None or _is_list_of_numbers(label) for label in labels):
            facts["label"] = pa.array(labels, pa.list_(pa.float64()))
        else:
            facts["label"] = pa.array([None if label is None else str(label) for label in labels], pa.string())
    return facts


def _is_list_of_numbers(label) -> bool:
    return isinstance(label, list) and all(isinstance(number, Real | None) for number in label)


def _write(folder: Path, tables: Iterator[pa.Table], rows_per_file: float) -> int:
    """Into files `0`, `1`, ... of `folder`; returns how many."""
    count = 0
    for table in tables:
        with ParquetWriter(folder / f"{count}", table.schema) as writer:
            writer.write_table(table)
            rows = len(table)
            while rows < rows_per_file and (table := next(tables, None)) is not None:
                writer.write_table(table)
                rows += len(table)
        count += 1
    if not count:
        raise ValueError("the source holds no images, expected at least one: check the source and the split.")
    return count


_CARD = """
# Latents of {images}

What the VAE+ pipeline `{pipeline}` says of each of {num_images:,} images: the posterior
q(z|x) = N(mean, diag(exp(logvar))) of its first VAE, over {latent_dim} latent dimensions.

| column | type | what it is |
|---|---|---|
| `index` | int64 | row of the image in the split `{split}` of its source |
{facts}| `mean` | {latent_dim} x float32 | posterior mean: the features of the image |
| `logvar` | {latent_dim} x float32 | log of the posterior variance; near 0 where a dimension is not used |

```python
from datasets import load_dataset

latents = load_dataset({repo_id}, split={name}).with_format("torch")
z = latents["mean"][:8]
```

Images: `{source}`, split `{split}`, {size} x {size} with {channels} channels, crop {crop}.
Command: `{command}`, commit {commit}, {date}, torch {torch}.

The model's decoder turns a mean back into a likeness of its image: licence and care that the images ask for hold for
these rows as well.
"""

_FACTS = {
    "file_name": "| `file_name` | string | file of the image, from the folder of the images |\n",
    "label": "| `label` | number, list or string | what the source says of the image |\n",
}


def latents_card(
    pipe: "VAEPlusPipeline",
    pipeline: str,
    images: "ImageDataset | ImageStream",
    split: str,
    crop: int | None,
    num_images: int,
    repo_id: str,
    columns: Collection[str] = (),
) -> str:
    """The `README.md` of a data set of latents.

    Args:
        pipe ([`VAEPlusPipeline`]), pipeline (`str`): what encoded, and its id or folder.
        images, split: of [`encode_to_parquet`], the split as it was asked for; num_images (`int`): encoded.
        crop (`int`, *optional*): of the images, in source pixels.
        repo_id (`str`): repository on the Hub, or folder, that the card is for.
        columns: of the files.
    """
    made = provenance()
    channels, size, _ = pipe.image_shape
    text = _CARD.format(
        images=plain_text(images.name),
        source=code_text(images.name),
        pipeline=code_text(os.path.basename(pipeline) if os.path.isabs(pipeline) else pipeline),
        num_images=num_images,
        latent_dim=pipe.vae.config.latent_dim,
        split=code_text(split).replace("|", "\\|"),  # in a table
        name=json.dumps(split_name(split)),
        repo_id=json.dumps(repo_id),
        facts="".join(line for name, line in _FACTS.items() if name in columns),
        size=size,
        channels=channels,
        crop="the largest square" if crop is None else f"{crop} pixels",
        command=code_text(made["command"]),
        commit=made["commit"],
        date=made["date"],
        torch=made["versions"]["torch"],
    )
    text = f"---\n{DatasetCardData(tags=['hf_vaeplus', 'latents'])}\n---\n{text}"
    return unicode_text(text)


def open_repository(repo_id: str, private: bool = False) -> None:
    """Make a data set repository on the Hub, or see that it can be written to: before the work, not after it.

    Raises:
        HfHubHTTPError: not logged in, not allowed, or no Hub.
        ValueError: no repository's name, or a public one where a private one is wanted.
    """
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
    if private and not api.dataset_info(repo_id).private:
        raise ValueError(f"the data set {repo_id} is on the Hub already, and public: take another name.")


def push_latents(files: list[Path], card: str, repo_id: str, split: str) -> str:
    """Upload what [`encode_to_parquet`] wrote, in one commit, in place of what the repository has of this split.

    Returns:
        Address of the repository.

    Raises:
        HfHubHTTPError: the Hub refused or did not answer.
    """
    api, names = HfApi(), _hub_names(split, len(files))
    there = api.list_repo_files(repo_id, repo_type="dataset")
    stale = [name for name in there if name.startswith(f"data/{split_name(split)}-") and name not in names]
    operations = [
        CommitOperationAdd("README.md", card.encode()),
        *(CommitOperationAdd(name, file) for name, file in zip(names, files, strict=True)),
        *(CommitOperationDelete(name) for name in stale),
    ]
    commit = api.create_commit(repo_id, operations, commit_message=f"Latents of {split}", repo_type="dataset")
    return str(commit.repo_url)
