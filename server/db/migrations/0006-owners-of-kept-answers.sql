-- Who makes a kept answer: the reply queue of a server, which is gone once that server is. Empty where an older version
-- has claimed it.
-- depends: 0004-kept-answers

ALTER TABLE kept_answers ADD COLUMN owner text NOT NULL DEFAULT '';
