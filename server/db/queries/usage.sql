SELECT model, type,
       sum(requests)::bigint AS requests,
       sum(texts)::bigint AS texts,
       sum(prompt_tokens)::bigint AS prompt_tokens,
       sum(completion_tokens)::bigint AS completion_tokens,
       coalesce(sum(requests) FILTER (WHERE day = %(today)s), 0)::bigint AS requests_today,
       coalesce(sum(requests) FILTER (WHERE day >= date_trunc('month', %(today)s::date)), 0)::bigint
           AS requests_this_month
FROM usage_daily
WHERE key_id = %(key_id)s
GROUP BY model, type
ORDER BY model, type
