"""Migrations over the data of the version before."""

import secrets
from pathlib import Path

import numpy as np
import psycopg
import yoyo
from pgvector import HalfVector
from pgvector.psycopg import register_vector

import server.db
from server.db.pool import make_pool, migrate
from server.db.store import SimilarQuery, Store

MIGRATIONS = Path(server.db.__file__).parent / "migrations"


async def test_vectors_of_the_version_before_are_found_and_counted(database_url: str) -> None:
    # Given a database of the first version, with chats of two keys and their vectors in two spaces
    name = f"old{secrets.token_hex(4)}"
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = database_url.replace("/postgres?", f"/{name}?")
    assert url != database_url
    first = yoyo.read_migrations(str(MIGRATIONS)).filter(lambda one: one.id == "0001-keys-chats-usage")
    backend = yoyo.get_backend(url.replace("postgresql://", "postgresql+psycopg://", 1))
    backend.apply_migrations(first)
    backend.connection.close()
    with psycopg.connect(url) as connection:
        register_vector(connection)
        connection.execute(
            "INSERT INTO api_keys (name, hash) SELECT 'k', sha256(n::text::bytea) FROM generate_series(1, 2) n"
        )
        connection.execute(
            """INSERT INTO chats (request_id, key_id, session_id, model, endpoint, messages, prompt_tokens,
                completion_tokens, finish_reason, created_at)
            SELECT n::text, 1 + n % 2, 's', 'm', '/chat', '[]', 1, 1, 'stop', now() FROM generate_series(1, 9) n"""
        )
        for chat_id, vector in enumerate(np.eye(9, 12), 1):
            for space in ("a", "b"):
                query = "INSERT INTO chat_vectors SELECT id, key_id, %s, %s FROM chats WHERE id = %s"
                connection.execute(query, [space, HalfVector(vector), chat_id])
    # When the others are applied
    assert "0002-vectors-by-key" in migrate(url)
    # Then each key finds its own, in each space, and their number is known
    pool = make_pool(url, max_size=1)
    await pool.open(wait=True)
    for key_id, mine in ((1, [2, 4, 6, 8]), (2, [1, 3, 5, 7, 9])):
        for space in ("a", "b"):
            rows = await Store(pool).similar(key_id, SimilarQuery(space, np.ones(12, np.float32), 100, 0.0))
            assert sorted(row["id"] for row in rows) == mine
    await pool.close()
    with psycopg.connect(url) as connection:
        query = "SELECT key_id, space, dimensions, vectors, indexed FROM vector_counts ORDER BY 1, 2"
        rows = connection.execute(query).fetchall()
    assert rows == [(1, "a", 12, 4, False), (1, "b", 12, 4, False), (2, "a", 12, 5, False), (2, "b", 12, 5, False)]
