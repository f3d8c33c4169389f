"""Made-up histories for benchmarks: vectors that lie as sentence embeddings do, and chats loaded in bulk."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

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
SAID = "What would you say about this, and why? " * 4


class Vectors:
    """Draws unit vectors of `dimensions`; those of two `draws` differ, and lie alike.

    Clustered, as embeddings of sentences are: each belongs to one of TOPICS, scattered about its centre within LATENT
    directions, the first of which matter most (their variance falls as 1/i), plus a little noise in all. Or,
    `uniform`, without any structure, which is the worst case for a search that is not exact.
    """

    def __init__(self, dimensions: int, draws: int = 0, *, uniform: bool = False) -> None:
        rng = np.random.default_rng(0)
        self._dimensions, self._uniform = dimensions, uniform
        scale = 1 / np.sqrt(np.arange(1, LATENT + 1, dtype=np.float32)[:, None])
        self._basis = rng.standard_normal((LATENT, dimensions), dtype=np.float32) * scale / np.sqrt(dimensions)
        self._centres = rng.standard_normal((TOPICS, LATENT), dtype=np.float32)
        self._rng = np.random.default_rng([0, draws])

    def draw(self, count: int) -> NDArray[np.float32]:
        """float32 (count, dimensions), L2-normalised."""
        made = self._rng.standard_normal((count, self._dimensions), dtype=np.float32)
        if not self._uniform:
            latent = self._centres[self._rng.integers(TOPICS, size=count)]
            latent = latent + 0.6 * self._rng.standard_normal(latent.shape, dtype=np.float32)
            made = latent @ self._basis + 0.2 / np.sqrt(self._dimensions) * made
        normalised: NDArray[np.float32] = made / np.linalg.norm(made, axis=1, keepdims=True)
        return normalised


@dataclass(frozen=True, slots=True)
class History:
    """`sizes`: chats of each key, by the key's id. They are said in turns, so that each key's lie scattered."""

    sizes: dict[int, int]
    space: str
    vectors: Vectors

    async def load(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """COPY it into a migrated database whose keys exist and have no chats, with what is counted from it."""
        keys = np.repeat(list(self.sizes), list(self.sizes.values()))
        np.random.default_rng(1).shuffle(keys)
        first = (await (await connection.execute("SELECT coalesce(max(id), 0) + 1 FROM chats")).fetchall())[0][0]
        with tqdm(total=len(keys), desc="loading", unit="chats") as bar:
            for part in np.split(keys, range(CHUNK, len(keys), CHUNK)):
                ids = np.arange(first + bar.n, first + bar.n + len(part))
                async with connection.cursor() as cursor:
                    async with cursor.copy(COPY_CHATS) as copy:
                        await copy.write("".join(map(_chat_line, ids.tolist(), part.tolist())))
                    async with cursor.copy(COPY_VECTORS) as copy:
                        rows = _rows(ids, part, self.space, self.vectors.draw(len(part)))
                        await copy.write(COPY_HEAD + rows.tobytes() + COPY_END)
                bar.update(len(part))
        for statement in COUNTS:
            await connection.execute(statement, {"keys": list(self.sizes)} if "%" in statement else None)


COPY_CHATS = """COPY chats (id, request_id, key_id, session_id, model, endpoint, messages, prompt_tokens,
    completion_tokens, finish_reason, created_at) FROM STDIN"""
COPY_VECTORS = "COPY chat_vectors (chat_id, key_id, space, embedding) FROM STDIN (FORMAT binary)"
COPY_HEAD, COPY_END = b"PGCOPY\n\xff\r\n\x00" + bytes(8), b"\xff\xff"
COUNTS = (
    "SELECT setval(pg_get_serial_sequence('chats', 'id'), max(id)) FROM chats",
    """INSERT INTO sessions SELECT key_id, session_id, count(*), sum(prompt_tokens), sum(completion_tokens),
        min(created_at), max(created_at) FROM chats WHERE key_id = ANY(%(keys)s) GROUP BY 1, 2""",
    """INSERT INTO session_counts SELECT key_id, count(*) FROM sessions WHERE key_id = ANY(%(keys)s) GROUP BY 1""",
    """INSERT INTO usage_daily SELECT key_id, (created_at AT TIME ZONE 'UTC')::date, model, 'chat', count(*), 0,
        sum(prompt_tokens), sum(completion_tokens) FROM chats WHERE key_id = ANY(%(keys)s) GROUP BY 1, 2, 3""",
    """INSERT INTO vector_counts SELECT key_id, space, max(vector_dims(embedding)), count(*) FROM chat_vectors
        WHERE key_id = ANY(%(keys)s) GROUP BY 1, 2""",
    "VACUUM (ANALYZE)",
)


def _chat_line(id_: int, key_id: int) -> str:
    """A row of `chats` in COPY's text format: ten chats a session, a minute between two chats of all."""
    messages = f'[{{"role":"user","content":"{SAID}{id_}"}},{{"role":"assistant","content":"{SAID}"}}]'
    at = datetime.fromtimestamp(FIRST + 60 * id_, UTC).isoformat()
    model = MODELS[id_ % len(MODELS)]
    session = f"s{id_ // CHATS_A_SESSION}"
    return f"{id_}\tr{id_}\t{key_id}\t{session}\t{model}\t/chat\t{messages}\t50\t80\tstop\t{at}\n"


def row_type(space: str, dimensions: int) -> np.dtype[Any]:
    """A row of `chat_vectors` in COPY's binary format: each field after its length, all big-endian."""
    chat = [("fields", ">i2"), ("l1", ">i4"), ("chat_id", ">i8"), ("l2", ">i4"), ("key_id", ">i8")]
    where = [("l3", ">i4"), ("space", f"S{len(space.encode())}"), ("l4", ">i4")]
    vector = [("dimensions", ">i2"), ("unused", ">i2"), ("embedding", ">f2", (dimensions,))]
    return np.dtype([*chat, *where, *vector])


def _rows(ids: NDArray[np.int64], keys: NDArray[np.int64], space: str, vectors: NDArray[np.float32]) -> NDArray[Any]:
    dimensions = vectors.shape[1]
    rows = np.zeros(len(ids), row_type(space, dimensions))
    rows["fields"], rows["l1"], rows["l2"], rows["l3"], rows["l4"] = 4, 8, 8, len(space.encode()), 4 + 2 * dimensions
    rows["chat_id"], rows["key_id"], rows["space"], rows["dimensions"] = ids, keys, space.encode(), dimensions
    rows["embedding"] = vectors
    return rows


async def stored(
    connection: psycopg.AsyncConnection[Any], key_id: int, space: str, dimensions: int
) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    """A key's vectors as Postgres keeps them: int64 (n,) ids of chats, float16 (n, dimensions)."""
    type_ = row_type(space, dimensions)
    query = "COPY (SELECT chat_id, key_id, space, embedding FROM chat_vectors WHERE key_id = %s AND space = %s)"
    content = bytearray()
    query += " TO STDOUT (FORMAT binary)"
    async with connection.cursor() as cursor, cursor.copy(query, [key_id, space]) as copy:
        async for block in copy:
            content += block
    count = (len(content) - len(COPY_HEAD) - len(COPY_END)) // type_.itemsize
    rows = np.frombuffer(content, type_, count, len(COPY_HEAD))
    return rows["chat_id"].astype(np.int64), rows["embedding"].astype(np.float16)
