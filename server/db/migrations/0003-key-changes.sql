-- Each change of a key is told to whoever caches keys. New keys are not: an unknown key is never cached.
-- depends: 0001-keys-chats-usage

CREATE FUNCTION tell_key_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- Without an id after a TRUNCATE: all of them.
    PERFORM pg_notify('api_keys', CASE WHEN TG_LEVEL = 'ROW' THEN OLD.id::text ELSE '' END);
    RETURN NULL;
END
$$;

CREATE TRIGGER tell_key_change AFTER UPDATE OR DELETE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION tell_key_change();
CREATE TRIGGER tell_keys_truncated AFTER TRUNCATE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION tell_key_change();
