-- How large a key's share of the turns is where several wait.
-- depends: 0001-keys-chats-usage

ALTER TABLE api_keys ADD COLUMN weight integer NOT NULL DEFAULT 1 CHECK (weight BETWEEN 1 AND 100);
