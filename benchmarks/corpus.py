"""Made-up histories for benchmarks: vectors that lie as sentence embeddings do, and chats loaded in bulk."""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import psycopg
from numpy.typing import NDArray
from tqdm import tqdm

TOPICS = 1000
LATENT = 64
"""Directions in which texts really differ."""
CHUNK = 10_000
CHATS_A_SESSION = 10
MODELS = ("qwen3-0.6b", "qwen3-4b")
FIRST = 1_700_000_000
"""When the first chat was said, in Unix seconds."""


class Vectors:
    """Draws unit vectors of `dimensions`.

    Clustered, as embeddings of sentences are: each belongs to one of TOPICS, scattered about its centre within LATENT
    directions, the first of which matter most (their variance falls as 1/i), plus a little noise in all. Or,
    `uniform`, without any structure, which is the worst case for a search that is not exact.
    """

    def __init__(self, dimensions: int, *, uniform: bool = False, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._dimensions, self._uniform = dimensions, uniform
        shape = (LATENT, dimensions)
        scale = 1 / np.sqrt(np.arange(1, LATENT + 1, dtype=np.float32)[:, None])
        self._basis = self._rng.standard_normal(shape, dtype=np.float32) * scale / np.sqrt(dimensions)
        self._centres = self._rng.standard_normal((TOPICS, LATENT), dtype=np.float32)

    def draw(self, count: int) -> NDArray[np.float32]:
        """float32 (count, dimensions), L2-normalised."""
        noise = self._rng.standard_normal((count, self._dimensions), dtype=np.float32)
        if self._uniform:
            made = noise
        else:
            latent = self._centres[self._rng.integers(TOPICS, size=count)]
            latent = latent + 0.6 * self._rng.standard_normal(latent.shape, dtype=np.float32)
            made = latent @ self._basis + 0.2 / np.sqrt(self._dimensions) * noise
        normalised: NDArray[np.float32] = made / np.linalg.norm(made, axis=1, keepdims=True)
        return normalised


@dataclass(frozen=True, slots=True)
class History:
    """`sizes`: chats of each key, by the key's id. They are said in turns, so that each key's lie scattered."""

    sizes: dict[int, int]
    space: str
    vectors: Vectors

    async def load(self, connection: psycopg.AsyncConnection[object]) -> None:
        """COPY it into an empty, migrated database whose keys exist, with what is counted from it."""
        keys = np.repeat(list(self.sizes), list(self.sizes.values()))
        np.random.default_rng(1).shuffle(keys)
        for start in tqdm(range(0, len(keys), CHUNK), "loading chats", unit_scale=CHUNK, unit="chats"):
            part = keys[start : start + CHUNK]
            ids = np.arange(start + 1, start + 1 + len(part))
            async with connection.cursor() as cursor:
                async with cursor.copy(COPY_CHATS) as copy:
                    await copy.write("".join(map(_chat_line, ids.tolist(), part.tolist())))
                async with cursor.copy(COPY_VECTORS) as copy:
                    await copy.write(_binary(ids, part, self.space, self.vectors.draw(len(part))))
        for statement in AFTERWARDS:
            await connection.execute(statement)


COPY_CHATS = """COPY chats (id, request_id, key_id, session_id, model, endpoint, messages, prompt_tokens,
    completion_tokens, finish_reason, created_at) FROM STDIN"""
COPY_VECTORS = "COPY chat_vectors (chat_id, key_id, space, embedding) FROM STDIN (FORMAT binary)"
AFTERWARDS = (
    "SELECT setval(pg_get_serial_sequence('chats', 'id'), max(id)) FROM chats",
    """INSERT INTO sessions SELECT key_id, session_id, count(*), sum(prompt_tokens), sum(completion_tokens),
        min(created_at), max(created_at) FROM chats GROUP BY 1, 2""",
    "INSERT INTO session_counts SELECT key_id, count(*) FROM sessions GROUP BY 1",
    """INSERT INTO usage_daily SELECT key_id, (created_at AT TIME ZONE 'UTC')::date, model, 'chat', count(*), 0,
        sum(prompt_tokens), sum(completion_tokens) FROM chats GROUP BY 1, 2, 3""",
    "VACUUM (ANALYZE)",
)
SAID = "What would you say about this, and why? " * 4


def _chat_line(id_: int, key_id: int) -> str:
    """A row of `chats` in COPY's text format: ten chats a session, a minute between two chats of all."""
    messages = f'[{{"role":"user","content":"{SAID}{id_}"}},{{"role":"assistant","content":"{SAID}"}}]'
    at = datetime.fromtimestamp(FIRST + 60 * id_, UTC).isoformat()
    model = MODELS[id_ % len(MODELS)]
    return f"{id_}\tr{id_}\t{key_id}\ts{id_ // CHATS_A_SESSION}\t{model}\t/chat\t{messages}\t50\t80\tstop\t{at}\n"


def _binary(ids: NDArray[np.int64], keys: NDArray[np.int64], space: str, vectors: NDArray[np.float32]) -> bytes:
    """Rows of `chat_vectors` in COPY's binary format: each field after its length, all big-endian."""
    name, dimensions = space.encode(), vectors.shape[1]
    row = np.dtype(
        [
            ("fields", ">i2"),
            ("l1", ">i4"),
            ("chat_id", ">i8"),
            ("l2", ">i4"),
            ("key_id", ">i8"),
            ("l3", ">i4"),
            ("space", f"S{len(name)}"),
            ("l4", ">i4"),
            ("dimensions", ">i2"),
            ("unused", ">i2"),
            ("embedding", ">f2", (dimensions,)),
        ]
    )
    rows = np.zeros(len(ids), row)
    rows["fields"], rows["l1"], rows["l2"], rows["l3"], rows["l4"] = 4, 8, 8, len(name), 4 + 2 * dimensions
    rows["chat_id"], rows["key_id"], rows["space"], rows["dimensions"] = ids, keys, name, dimensions
    rows["embedding"] = vectors
    return b"PGCOPY\n\xff\r\n\x00" + bytes(8) + rows.tobytes() + b"\xff\xff"
